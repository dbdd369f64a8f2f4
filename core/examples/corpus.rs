//! Writes start corpora for the fuzz targets: `corpus DIR` puts valid blocks of the
//! golden volumes, and random scripts for the targets that follow one, below `DIR/TARGET`.

#![allow(missing_docs, reason = "a program")]

use outrider_core::env::Entropy;
use outrider_core::env::testing::TestEntropy;
use outrider_core::format::{Magic, read_header};
use outrider_core::hurt::volume::Subject;
use std::path::PathBuf;
use std::process::ExitCode;

/// Blocks of each kind from each volume.
const EACH: usize = 24;

fn write(dir: &std::path::Path) -> std::io::Result<()> {
    let kinds = [
        (Magic::Btree, "btree_block"),
        (Magic::AllocList, "alloc_list"),
        (Magic::SrchBlock, "srch"),
    ];
    for volume in ["a", "b", "c1"] {
        let blocks = Subject::golden(volume).large_blocks();
        for (magic, target) in kinds {
            let dir = dir.join(target);
            std::fs::create_dir_all(&dir)?;
            let same = |b: &&Vec<u8>| read_header(b).magic.get() == magic.value();
            let found: Vec<&Vec<u8>> = blocks.iter().filter(same).collect();
            let step = found.len().div_ceil(EACH).max(1);
            for (n, block) in found.iter().step_by(step).enumerate() {
                std::fs::write(dir.join(format!("{volume}-{n}")), block)?;
            }
        }
    }
    let entropy = TestEntropy::new(1);
    for target in ["btree_ops", "volume", "messages"] {
        let dir = dir.join(target);
        std::fs::create_dir_all(&dir)?;
        for n in 0..EACH {
            let len = entropy.range(20, 200);
            let script: Vec<u8> = (0..len).map(|_| entropy.next_u64() as u8).collect();
            std::fs::write(dir.join(format!("script-{n}")), script)?;
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    let Some(dir) = std::env::args_os().nth(1) else {
        eprintln!("usage: corpus DIR");
        return ExitCode::from(2);
    };
    match write(&PathBuf::from(dir)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
