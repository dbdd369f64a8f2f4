//! Findings in words.

use super::Record;
use crate::model::{Model, Reply};
use outrider_core::fs::api::Ino;

/// Why none of the calls that could come next may have given its answer.
pub(super) fn explain(state: &Model, records: &[Record], candidates: &[usize]) -> String {
    let mut lines = vec!["no order of the calls explains the answers; stuck at:".to_owned()];
    for record in candidates.iter().map(|index| &records[*index]).take(6) {
        let reply = record.reply.as_ref();
        let answer = reply.map_or_else(|| "(no answer)".to_owned(), |r| format!("{r:?}"));
        let mut answer = answer;
        answer.truncate(600);
        let mut call = format!("{:?}", record.call);
        call.truncate(300);
        lines.push(format!(
            "  [{}..{}] {call} -> {answer}",
            record.at.0, record.at.1
        ));
        let mut about: Vec<Ino> = record.call.subjects().into_iter().flatten().collect();
        if let Some(Reply::Entry(attr)) = reply {
            about.push(attr.ino);
        }
        for ino in about {
            lines.push(format!("    model: {}", describe(state, ino)));
        }
    }
    lines.join("\n")
}

/// An inode as the model has it.
fn describe(state: &Model, ino: Ino) -> String {
    let Some(inode) = state.get(ino) else {
        return format!("inode {ino} never existed or is gone");
    };
    let names: Vec<String> = inode
        .entries
        .iter()
        .map(|(name, entry)| {
            let mut name = String::from_utf8_lossy(name).into_owned();
            name.truncate(12);
            format!("{name}:{}", entry.ino)
        })
        .collect();
    format!(
        "inode {ino} mode {:o} nlink {} uid {} gid {} size {} opens {} mtime {}..{} ctime {}..{} \
         blocks {:?} xattrs {:?} entries [{}]",
        inode.mode,
        inode.nlink,
        inode.uid,
        inode.gid,
        inode.size,
        inode.opens,
        inode.mtime.low,
        inode.mtime.high,
        inode.ctime.low,
        inode.ctime.high,
        inode.blocks.keys().take(20).collect::<Vec<_>>(),
        inode.xattrs.keys().collect::<Vec<_>>(),
        names.join(" ")
    )
}
