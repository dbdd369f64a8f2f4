//! Random operations, with faults at any item operation, compared with the model.

use super::*;

/// Names and xattrs of everything, from the filesystem.
fn compare(w: &World, model: &Model) {
    for (&ino, node) in &model.nodes {
        let attr = w.attr(ino).unwrap();
        assert_eq!(attr.nlink, node.nlink, "nlink of {ino}");
        assert_eq!(
            w.names(ino),
            node.xattrs.keys().cloned().collect::<Vec<_>>()
        );
        for (name, value) in &node.xattrs {
            assert_eq!(&w.get(ino, name).unwrap(), value);
        }
        if let Some(children) = &node.children {
            let mut listed: Vec<_> = w.list(ino).into_iter().map(|(n, i, _)| (n, i)).collect();
            listed.drain(..2);
            listed.sort();
            assert_eq!(listed, children.clone().into_iter().collect::<Vec<_>>());
            for (name, child) in children {
                assert_eq!(w.lookup(ino, name).unwrap().ino, *child);
            }
        }
    }
}

fn is_fault(error: E) -> bool {
    matches!(error, E::ENOSPC | E::EIO)
}

struct Walk {
    w: World,
    model: Model,
    rng: Rc<TestEntropy>,
    handles: Vec<(Ino, u64)>,
    faults: bool,
}

impl Walk {
    fn new(seed: u64, faults: bool) -> Self {
        let rng = TestEntropy::new(seed);
        Self {
            w: World::new(2),
            model: Model::rooted(1),
            rng,
            handles: Vec::new(),
            faults,
        }
    }
    fn name(&self) -> String {
        ["a", "b", "c", "d", "file-1", "abcdefgh"][self.rng.range(0, 6) as usize].into()
    }
    fn any(&self) -> Ino {
        let all: Vec<Ino> = self.model.nodes.keys().copied().collect();
        all[self.rng.range(0, all.len() as u64) as usize]
    }
    fn any_dir(&self) -> Ino {
        let live = |i: &Ino| self.model.is_dir(*i);
        let all: Vec<Ino> = self.model.nodes.keys().copied().filter(live).collect();
        // Sometimes not a directory at all.
        if self.rng.chance(1, 30) {
            self.any()
        } else {
            all[self.rng.range(0, all.len() as u64) as usize]
        }
    }

    /// Compares an outcome; true if the model is to follow.
    fn agree<T: std::fmt::Debug>(&self, got: &Result<T, E>, want: Result<bool, E>) -> bool {
        self.w.log.fail_in.set(None);
        match (got, want) {
            (Ok(_), Ok(done)) => done,
            (Err(error), _) if self.faults && is_fault(*error) => false,
            (Err(got), Err(want)) => {
                assert_eq!(*got, want);
                false
            }
            (got, want) => panic!("got {got:?}, want {want:?}"),
        }
    }

    fn step(&mut self) {
        if self.faults && self.rng.chance(1, 2) {
            self.w.log.fail_in.set(Some(self.rng.range(0, 30) as u32));
        }
        if self.rng.chance(1, 10) {
            self.w
                .log
                .seq
                .set(self.w.log.seq.get() + self.rng.range(1, 1500));
        }
        let (dir, name) = (self.any_dir(), self.name());
        match self.rng.range(0, 13) {
            0 | 1 => {
                let want = self.model.parent_for_new(dir, &name).map(|()| true);
                let got = self.w.mkdir(dir, &name);
                if self.agree(&got, want) {
                    self.model.add(dir, &name, got.unwrap(), true);
                }
            }
            2..=4 => {
                let want = self.model.parent_for_new(dir, &name).map(|()| true);
                let got = self.w.create(dir, &name);
                if self.agree(&got, want) {
                    let (ino, fh) = got.unwrap();
                    self.model.add(dir, &name, ino, false);
                    self.model.nodes.get_mut(&ino).unwrap().open = 1;
                    self.handles.push((ino, fh));
                }
            }
            5 | 6 => {
                let rmdir = self.rng.chance(1, 2);
                let want = self.model.removed(dir, &name, rmdir).map(|_| true);
                let got = if rmdir {
                    self.w.rmdir(dir, &name)
                } else {
                    self.w.unlink(dir, &name)
                };
                if self.agree(&got, want) {
                    self.model.drop_name(dir, &name);
                }
            }
            7 | 8 => self.rename(dir, &name),
            9 => self.link(dir, &name),
            10 => self.xattr(),
            11 => {
                let ino = self.any();
                let got = self.w.run(self.w.fs.open(&ROOT, ino, 0));
                if self.agree(&got, Ok(true)) {
                    self.model.nodes.get_mut(&ino).unwrap().open += 1;
                    self.handles.push((ino, got.unwrap().fh));
                }
            }
            _ => {
                if !self.handles.is_empty() {
                    let at = self.rng.range(0, self.handles.len() as u64) as usize;
                    let (ino, fh) = self.handles.swap_remove(at);
                    self.w.run(self.w.fs.release(ino, fh));
                    self.w.log.fail_in.set(None);
                    self.model.nodes.get_mut(&ino).unwrap().open -= 1;
                    self.model.reap(ino);
                }
            }
        }
        self.w.log.fail_in.set(None);
        self.w.check();
    }

    fn rename(&mut self, dir: Ino, name: &str) {
        let (to, new) = (self.any_dir(), self.name());
        let noreplace = self.rng.chance(1, 4);
        let want = self.model.may_rename(dir, name, to, &new, noreplace);
        let got = self.w.rename(dir, name, to, &new, u32::from(noreplace));
        // A removed directory has no way up: the walk says so, whatever else is wrong.
        if got == Err(E::ENOENT)
            && (self.model.nodes[&to].nlink == 0 || self.model.nodes[&dir].nlink == 0)
        {
            return;
        }
        if self.agree(&got, want) {
            self.model.rename(dir, name, to, &new);
        }
    }

    fn link(&mut self, dir: Ino, name: &str) {
        let ino = self.any();
        let want = if self.model.is_dir(ino) {
            Err(E::EPERM)
        } else {
            self.model.parent_for_new(dir, name).map(|()| true)
        };
        let got = self.w.run(self.w.fs.link(&ROOT, ino, dir, name.as_bytes()));
        if self.agree(&got, want) {
            self.model.children(dir).insert(name.into(), ino);
            self.model.nodes.get_mut(&ino).unwrap().nlink += 1;
        }
    }

    fn xattr(&mut self) {
        let ino = self.any();
        let name = [
            "user.a",
            "trusted.b",
            "scoutfs.totl.x.1.1.1",
            "scoutfs.indx.x.1.1",
        ][self.rng.range(0, 4) as usize];
        let had = self.model.nodes[&ino].xattrs.contains_key(name);
        if self.rng.chance(1, 3) {
            let got = self.w.remove(ino, name);
            if self.agree(&got, if had { Ok(true) } else { Err(E::ENODATA) }) {
                self.model.nodes.get_mut(&ino).unwrap().xattrs.remove(name);
            }
            return;
        }
        let value = match name {
            "scoutfs.totl.x.1.1.1" => self.rng.range(0, 100).to_string().into_bytes(),
            "scoutfs.indx.x.1.1" => Vec::new(),
            _ => vec![7; self.rng.range(0, 3000) as usize],
        };
        let got = self.w.set(ino, name, &value);
        if self.agree(&got, Ok(true)) {
            // Tagged names without the hide tag are listed.
            self.model
                .nodes
                .get_mut(&ino)
                .unwrap()
                .xattrs
                .insert(name.into(), value);
        }
    }

    fn finish(mut self) {
        compare(&self.w, &self.model);
        for (ino, fh) in std::mem::take(&mut self.handles) {
            self.w.run(self.w.fs.release(ino, fh));
            self.model.nodes.get_mut(&ino).unwrap().open -= 1;
            self.model.reap(ino);
        }
        self.w.run(self.w.fs.scan_orphans());
        self.w.check();
        compare(&self.w, &self.model);
        assert_eq!(self.w.log.count.get() + 1, self.model.nodes.len() as i64);
        assert_eq!(
            (self.w.fs.table.state_len(), self.w.fs.local.in_use()),
            (0, 0)
        );
    }
}

#[test]
fn the_namespace_does_what_the_model_does() {
    for seed in 0..25 {
        let mut walk = Walk::new(seed, false);
        for _ in 0..300 {
            walk.step();
        }
        walk.finish();
    }
}

#[test]
fn a_failed_operation_leaves_nothing_behind() {
    for seed in 0..25 {
        let mut walk = Walk::new(seed, true);
        for _ in 0..300 {
            walk.step();
        }
        walk.finish();
    }
}
