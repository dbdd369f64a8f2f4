//! Comparison of what is there after a crash with a state of the model.
//!
//! Everything but file contents must be exactly that of the state. Contents
//! are written in place, so a byte may also show a later, uncommitted write to
//! it, or zero where a later truncate cleared it (spec 14 sections 20 and 24).
//! It never shows anything else.

use super::{BLOCK, Call, Inode, Model, pattern_byte};
use outrider_core::fs::api::Ino;
use std::rc::Rc;

/// Why an observed state is not this one.
pub type Difference = String;

/// Calls that a cut leaves out: asked for, but not part of the state.
#[derive(Default)]
pub struct Later<'a> {
    calls: Vec<&'a Call>,
}

impl<'a> Later<'a> {
    /// Those calls.
    pub fn new(calls: impl IntoIterator<Item = &'a Call>) -> Self {
        Self {
            calls: calls
                .into_iter()
                .filter(|call| call.changes_data_of().is_some())
                .collect(),
        }
    }

    /// Whether one of the calls may have put `byte` at `offset` of the file.
    /// `size` is the file's size in the state, where an append may begin.
    fn explains(&self, ino: Ino, offset: u64, byte: u8) -> bool {
        self.calls.iter().any(|call| match call {
            Call::Write {
                ino: file,
                offset: start,
                len,
                tag,
                append,
                ..
            } => {
                let reach = *start..*start + u64::from(*len);
                *file == ino
                    && (*append || reach.contains(&offset))
                    && byte == pattern_byte(*tag, offset)
            }
            Call::Setattr { ino: file, set } => {
                let cleared = set.size.is_some_and(|size| offset >= size);
                *file == ino && byte == 0 && cleared
            }
            _ => false,
        })
    }
}

impl Model {
    /// Compares this state with an observed one. If they agree, gives the state
    /// to go on with: the observed contents and times, this one's history.
    ///
    /// # Errors
    /// The first difference.
    pub fn recovered_as(&self, observed: &Model, later: &Later) -> Result<Model, Difference> {
        let mine = self.after_crash();
        if let Some(ino) = mine.inodes.keys().find(|ino| observed.get(**ino).is_none()) {
            return Err(format!("inode {ino} is missing"));
        }
        if let Some(ino) = observed.inodes.keys().find(|ino| mine.get(**ino).is_none()) {
            return Err(format!("inode {ino} is not expected"));
        }
        let mut next = mine.clone();
        for (ino, expected) in &mine.inodes {
            let seen = observed.get(*ino).expect("both have it");
            compare_attributes(*ino, expected, seen)?;
            let changed = compare_data(*ino, expected, seen, later)?;
            if changed || expected.mtime != seen.mtime || expected.ctime != seen.ctime {
                let inode = Rc::make_mut(next.inodes.get_mut(ino).expect("cloned"));
                inode.mtime = seen.mtime;
                inode.ctime = seen.ctime;
                inode.blocks = seen.blocks.clone();
            }
        }
        Ok(next)
    }
}

fn compare_attributes(ino: Ino, expected: &Inode, seen: &Inode) -> Result<(), Difference> {
    let differ = |what: &str, want: &dyn std::fmt::Debug, got: &dyn std::fmt::Debug| {
        Err(format!("inode {ino}: {what} is {got:?}, expected {want:?}"))
    };
    if expected.mode != seen.mode {
        return differ("mode", &expected.mode, &seen.mode);
    }
    if expected.nlink != seen.nlink {
        return differ("nlink", &expected.nlink, &seen.nlink);
    }
    if (expected.uid, expected.gid, expected.rdev) != (seen.uid, seen.gid, seen.rdev) {
        return differ(
            "owner",
            &(expected.uid, expected.gid),
            &(seen.uid, seen.gid),
        );
    }
    if expected.size != seen.size {
        return differ("size", &expected.size, &seen.size);
    }
    let times = [(expected.mtime, seen.mtime), (expected.ctime, seen.ctime)];
    for (name, (want, got)) in ["mtime", "ctime"].into_iter().zip(times) {
        if !want.admits(got.low) {
            return differ(name, &want, &got.low);
        }
    }
    if expected.xattrs != seen.xattrs {
        let want: Vec<_> = expected.xattrs.iter().map(|(n, v)| (n, v.len())).collect();
        let got: Vec<_> = seen.xattrs.iter().map(|(n, v)| (n, v.len())).collect();
        return differ("the set of xattrs", &want, &got);
    }
    if expected.target != seen.target {
        return differ("the target", &expected.target.len(), &seen.target.len());
    }
    if expected.is_dir() && expected.parent != seen.parent {
        return differ("the parent", &expected.parent, &seen.parent);
    }
    for (name, entry) in &expected.entries {
        let got = seen.entries.get(name).map(|entry| entry.ino);
        if got != Some(entry.ino) {
            return differ(&format!("the entry {name:?}"), &entry.ino, &got);
        }
    }
    if let Some(name) = seen
        .entries
        .keys()
        .find(|name| !expected.entries.contains_key(*name))
    {
        return Err(format!("inode {ino}: the entry {name:?} is not expected"));
    }
    Ok(())
}

fn compare_data(
    ino: Ino,
    expected: &Inode,
    seen: &Inode,
    later: &Later,
) -> Result<bool, Difference> {
    if !expected.blocks.keys().eq(seen.blocks.keys()) {
        return Err(format!(
            "inode {ino}: written blocks are {:?}, expected {:?}",
            seen.blocks.keys().collect::<Vec<_>>(),
            expected.blocks.keys().collect::<Vec<_>>()
        ));
    }
    let mut changed = false;
    for (block, want) in &expected.blocks {
        let got = &seen.blocks[block];
        if Rc::ptr_eq(want, got) || want == got {
            continue;
        }
        changed = true;
        for (index, (want, got)) in want.iter().zip(got.iter()).enumerate() {
            let offset = block * BLOCK + index as u64;
            if want != got && offset < expected.size && !later.explains(ino, offset, *got) {
                return Err(format!(
                    "inode {ino}: byte {offset} is {got:#04x}, expected {want:#04x} \
                     or a value of an uncommitted write"
                ));
            }
        }
    }
    Ok(changed)
}
