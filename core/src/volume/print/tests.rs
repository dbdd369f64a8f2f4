//! Prints of golden volumes hold what the original's print shows.

use super::*;
use crate::env::testing::block_on;
use crate::volume::golden::golden;
use std::collections::BTreeMap;

fn records(name: &str, skip_huge: bool) -> Vec<Record> {
    let mut found = Vec::new();
    let options = PrintOptions { skip_huge };
    let volume = golden(name);
    block_on(print(volume.meta.handle(), options, &mut |r| found.push(r))).expect("a print");
    found
}

fn counts(found: &[Record]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for record in found {
        let value = record.get("value").and_then(|v| v["kind"].as_str());
        let name = value.unwrap_or(record.kind());
        *counts.entry(name.to_owned()).or_default() += 1;
    }
    counts
}

#[test]
fn a_populated_volume_is_printed_whole() {
    let found = records("b", false);
    let counts = counts(&found);
    // Numbers counted in the print of the original.
    assert_eq!(counts["quorum_block"], 15);
    assert_eq!(counts["inode"], 5294);
    assert_eq!(counts["dirent"], 3 * 5315);
    assert_eq!(counts["quota rule"], 5);
    assert_eq!(counts["srch_block"], 1);
    assert_eq!(counts["alloc_list_block"], 3);
    assert_eq!(counts["btree_block"], 118 + 5);
    assert_eq!(counts.get("problem"), None);
    assert!(
        found
            .iter()
            .all(|r| r.get("value").is_none_or(|v| v.get("undecoded").is_none()))
    );
    let text: String = found.iter().map(|r| format!("{r}\n")).collect();
    for expected in [
        "name user.ondir",
        "total 280",
        "b174e9f4147434ad.16378.3",
        "18193,6373",
        "major 5 minor 103 xid 6",
        "rid 08f6209e97af18aa",
        "blkno 532993",
    ] {
        assert!(text.contains(expected), "{expected}");
    }
    let line = serde_json::to_string(&found[0]).unwrap();
    assert!(line.starts_with(r#"{"record":"super""#), "{line}");
}

#[test]
fn crashed_volumes_show_their_log_trees() {
    let found = records("c1", false);
    let counts = counts(&found);
    assert_eq!(counts["mounted client"], 1);
    assert_eq!(counts["bloom_block"], 1);
    assert_eq!(counts["log trees"], 1);
    assert_eq!(counts.get("problem"), None);
}

#[test]
fn huge_structures_can_be_left_out() {
    let found = records("b", true);
    assert!(found.len() < 60, "{}", found.len());
}

#[test]
fn any_block_is_printed_alone_as_in_the_whole() {
    let volume = golden("b");
    let block = |blkno| {
        let mut found = Vec::new();
        let result = block_on(print_block(volume.meta.handle(), blkno, &mut |r| {
            found.push(r);
        }));
        result.map(|()| found)
    };
    let whole = records("b", false);
    let number = |record: &Record| record.get("hdr")?["blkno"].as_u64();
    let mut kinds = std::collections::BTreeSet::new();
    for (place, record) in whole.iter().enumerate() {
        let Some(blkno) = number(record) else {
            continue;
        };
        if matches!(record.kind(), "super" | "quorum_block") {
            continue;
        }
        kinds.insert(record.kind());
        let alone = block(blkno).expect("a block");
        assert_eq!(alone[0].kind(), record.kind());
        assert_eq!(alone[0].get("hdr"), record.get("hdr"));
        let items = &whole[place + 1..];
        let items = items.iter().take_while(|r| r.kind() == "item");
        let items: Vec<&Record> = items.collect();
        assert_eq!(alone[1..].iter().collect::<Vec<_>>(), items);
    }
    assert!(kinds.len() >= 3, "{kinds:?}");
    let first: Vec<&str> = ["super"].into_iter().chain(["quorum_block"; 15]).collect();
    let found = block(1).expect("the first block");
    assert_eq!(found.iter().map(Record::kind).collect::<Vec<_>>(), first);
    assert!(block(1 << 40).is_err());
    // A block of zeroes is one of no kind.
    assert_eq!(block(0).expect("a block")[0].kind(), "block");
}
