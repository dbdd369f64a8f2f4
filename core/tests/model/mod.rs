//! The namespace of POSIX in a few maps: what a filesystem must agree with.

use crate::errno::Errno as E;
use std::collections::BTreeMap;

type Ino = u64;

/// A model of the namespace, in the words of POSIX.
#[derive(Clone, Debug, Default)]
pub struct Model {
    pub root: Ino,
    pub nodes: BTreeMap<Ino, Node>,
}

#[derive(Clone, Debug, Default)]
pub struct Node {
    pub children: Option<BTreeMap<String, Ino>>,
    pub nlink: u32,
    pub xattrs: BTreeMap<String, Vec<u8>>,
    pub open: u32,
    pub data: Vec<u8>,
}

impl Model {
    /// Only a root directory, with this number.
    pub fn rooted(root: Ino) -> Self {
        let node = Node {
            children: Some(BTreeMap::new()),
            nlink: 2,
            ..Node::default()
        };
        Self {
            root,
            nodes: BTreeMap::from([(root, node)]),
        }
    }
    pub fn dir(&self, ino: Ino) -> Result<&BTreeMap<String, Ino>, E> {
        self.nodes
            .get(&ino)
            .ok_or(E::ESTALE)?
            .children
            .as_ref()
            .ok_or(E::ENOTDIR)
    }
    pub fn children(&mut self, ino: Ino) -> &mut BTreeMap<String, Ino> {
        self.nodes.get_mut(&ino).unwrap().children.as_mut().unwrap()
    }
    pub fn is_dir(&self, ino: Ino) -> bool {
        self.nodes[&ino].children.is_some()
    }
    pub fn parent_for_new(&self, dir: Ino, name: &str) -> Result<(), E> {
        let children = self.dir(dir)?;
        if self.nodes[&dir].nlink == 0 {
            return Err(E::ENOENT);
        }
        if children.contains_key(name) {
            Err(E::EEXIST)
        } else {
            Ok(())
        }
    }
    pub fn add(&mut self, dir: Ino, name: &str, ino: Ino, is_dir: bool) {
        self.children(dir).insert(name.into(), ino);
        let children = is_dir.then(BTreeMap::new);
        let nlink = if is_dir { 2 } else { 1 };
        self.nodes.insert(
            ino,
            Node {
                children,
                nlink,
                ..Node::default()
            },
        );
        if is_dir {
            self.nodes.get_mut(&dir).unwrap().nlink += 1;
        }
    }
    pub fn reap(&mut self, ino: Ino) {
        let gone = self
            .nodes
            .get(&ino)
            .is_some_and(|n| n.nlink == 0 && n.open == 0);
        if gone {
            self.nodes.remove(&ino);
        }
    }
    pub fn removed(&mut self, dir: Ino, name: &str, rmdir: bool) -> Result<Ino, E> {
        let ino = *self.dir(dir)?.get(name).ok_or(E::ENOENT)?;
        match (rmdir, self.is_dir(ino)) {
            (true, false) => return Err(E::ENOTDIR),
            (false, true) => return Err(E::EISDIR),
            _ => {}
        }
        if rmdir && !self.dir(ino)?.is_empty() {
            return Err(E::ENOTEMPTY);
        }
        Ok(ino)
    }
    pub fn drop_name(&mut self, dir: Ino, name: &str) {
        let ino = self.children(dir).remove(name).unwrap();
        if self.is_dir(ino) {
            self.nodes.get_mut(&dir).unwrap().nlink -= 1;
            self.nodes.get_mut(&ino).unwrap().nlink = 0;
        } else {
            self.nodes.get_mut(&ino).unwrap().nlink -= 1;
        }
        self.reap(ino);
    }
    pub fn below(&self, top: Ino, ino: Ino) -> bool {
        if top == ino {
            return true;
        }
        let children = self.nodes.get(&top).and_then(|n| n.children.as_ref());
        children.is_some_and(|c| c.values().any(|&c| self.below(c, ino)))
    }
    /// Whether the rename is to be done, or refused.
    pub fn may_rename(
        &self,
        from: Ino,
        a: &str,
        to: Ino,
        b: &str,
        noreplace: bool,
    ) -> Result<bool, E> {
        let old = *self.dir(from)?.get(a).ok_or(E::ENOENT)?;
        let new = self.dir(to)?.get(b).copied();
        if from != to {
            // A removed directory has no way up to the root.
            let is_dir = self.is_dir(old) || new.is_some_and(|n| self.is_dir(n));
            if is_dir && self.below(old, to) {
                return Err(E::EINVAL);
            }
            if new.is_some_and(|new| self.is_dir(new) && self.below(new, from)) {
                return Err(E::ENOTEMPTY);
            }
        }
        if self.nodes[&to].nlink == 0 {
            return Err(E::ENOENT);
        }
        if new.is_some() && noreplace {
            return Err(E::EEXIST);
        }
        let Some(new) = new else { return Ok(true) };
        if new == old {
            return Ok(false);
        }
        match (self.is_dir(old), self.is_dir(new)) {
            (true, false) => Err(E::ENOTDIR),
            (false, true) => Err(E::EISDIR),
            (true, true) if !self.dir(new)?.is_empty() => Err(E::ENOTEMPTY),
            _ => Ok(true),
        }
    }
    pub fn rename(&mut self, from: Ino, a: &str, to: Ino, b: &str) {
        if self.children(to).contains_key(b) {
            self.drop_name(to, b);
        }
        let ino = self.children(from).remove(a).unwrap();
        self.children(to).insert(b.into(), ino);
        if self.is_dir(ino) && from != to {
            self.nodes.get_mut(&from).unwrap().nlink -= 1;
            self.nodes.get_mut(&to).unwrap().nlink += 1;
        }
    }
}
