//! The promises of specs 12 and 13, one by one.

use super::*;

#[test]
fn a_new_file_has_all_its_items() {
    let w = World::new(2);
    let dir = w.mkdir(1, "dir").unwrap();
    let ino = w.file(dir, "file");
    assert_eq!(w.attr(ROOT_INO).unwrap().nlink, 3);
    let attr = w.lookup(dir, "file").unwrap();
    assert_eq!((attr.ino, attr.mode, attr.nlink), (ino, S_IFREG | 0o644, 1));
    assert_ne!(
        dir & !1023,
        ino & !1023,
        "directories and files use different groups"
    );
    assert!(w.has(Key::data_seq(5000, ino)) && w.has(Key::meta_seq(5000, ino)));
    assert_eq!(w.attr(dir).unwrap().size, 4);
    w.check();
}

#[test]
fn create_completes_on_the_first_poll() {
    let w = World::new(2);
    w.file(1, "warm");
    w.world.exec.make_yields_free();
    let mut future = std::pin::pin!(w.fs.create(&ROOT, 1, b"f", 0o644, 0, 2));
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(future.as_mut().poll(&mut cx).is_ready());
}

#[test]
fn names_are_checked() {
    let w = World::new(2);
    let long = "x".repeat(256);
    assert_eq!(w.mkdir(1, &long), Err(E::ENAMETOOLONG));
    assert_eq!(w.lookup(1, &long), Err(E::ENAMETOOLONG));
    assert!(w.mkdir(1, &long[..255]).is_ok());
    assert_eq!(w.lookup(1, "nothing"), Err(E::ENOENT));
    let file = w.file(1, "file");
    assert_eq!(w.lookup(file, "x"), Err(E::ENOTDIR));
    assert_eq!(w.mkdir(file, "x"), Err(E::ENOTDIR));
    assert_eq!(w.mkdir(1, "file"), Err(E::EEXIST));
    assert_eq!(w.mkdir(77777, "x"), Err(E::ESTALE));
    w.check();
}

#[test]
fn removal_checks_types_and_emptiness() {
    let w = World::new(2);
    let dir = w.mkdir(1, "d").unwrap();
    w.file(dir, "f");
    assert_eq!(w.unlink(1, "d"), Err(E::EISDIR));
    assert_eq!(w.rmdir(dir, "f"), Err(E::ENOTDIR));
    assert_eq!(w.rmdir(1, "d"), Err(E::ENOTEMPTY));
    w.unlink(dir, "f").unwrap();
    w.rmdir(1, "d").unwrap();
    assert_eq!(w.attr(dir), Err(E::ESTALE), "deleted in the call");
    assert_eq!(w.mkdir(dir, "x"), Err(E::ESTALE));
    w.check();
    assert_eq!(w.log.count.get(), 0);
}

#[test]
fn an_open_file_outlives_its_name() {
    let w = World::new(2);
    let (ino, fh) = w.create(1, "f").unwrap();
    w.unlink(1, "f").unwrap();
    assert_eq!(w.attr(ino).unwrap().nlink, 0);
    w.check();
    assert_eq!(w.run(w.fs.lookup(&ROOT, ino, b".")), Err(E::ESTALE));
    let again = w.run(w.fs.open(&ROOT, ino, 0)).unwrap();
    w.run(w.fs.release(ino, fh));
    assert!(w.attr(ino).is_ok());
    w.run(w.fs.release(ino, again.fh));
    assert_eq!(w.attr(ino), Err(E::ESTALE));
    w.check();
}

#[test]
fn a_removed_open_directory_takes_no_entries() {
    let w = World::new(2);
    let dir = w.mkdir(1, "d").unwrap();
    let fh = w.run(w.fs.opendir(&ROOT, dir, 0)).unwrap().fh;
    w.rmdir(1, "d").unwrap();
    assert_eq!(w.mkdir(dir, "x"), Err(E::ENOENT));
    let file = w.file(1, "f");
    assert_eq!(w.run(w.fs.link(&ROOT, file, dir, b"x")), Err(E::ENOENT));
    assert_eq!(w.rename(1, "f", dir, "x", 0), Err(E::ENOENT));
    w.check();
    w.run(w.fs.releasedir(dir, fh));
    w.check();
    assert_eq!(w.fs.table.state_len(), 0);
}

#[test]
fn a_tmpfile_lives_while_open_or_linked() {
    let w = World::new(2);
    let (entry, opened) = w.run(w.fs.tmpfile(&ROOT, 1, 0o600, 0, 2)).unwrap();
    let ino = entry.attr.ino;
    assert_eq!(entry.attr.nlink, 0);
    w.check();
    let linked = w.run(w.fs.link(&ROOT, ino, 1, b"named")).unwrap();
    assert_eq!(linked.attr.nlink, 1);
    w.run(w.fs.release(ino, opened.fh));
    assert_eq!(w.lookup(1, "named").unwrap().ino, ino);
    w.check();
    let (entry, opened) = w.run(w.fs.tmpfile(&ROOT, 1, 0o600, 0, 2)).unwrap();
    w.run(w.fs.release(entry.attr.ino, opened.fh));
    assert_eq!(w.attr(entry.attr.ino), Err(E::ESTALE));
    w.check();
}

#[test]
fn hard_links_count() {
    let w = World::new(2);
    let dir = w.mkdir(1, "d").unwrap();
    let ino = w.file(1, "a");
    w.run(w.fs.link(&ROOT, ino, dir, b"b")).unwrap();
    assert_eq!(w.run(w.fs.link(&ROOT, ino, dir, b"b")), Err(E::EEXIST));
    assert_eq!(w.run(w.fs.link(&ROOT, dir, 1, b"c")), Err(E::EPERM));
    assert_eq!(w.attr(ino).unwrap().nlink, 2);
    w.rename(1, "a", dir, "b", 0).unwrap();
    assert_eq!(w.attr(ino).unwrap().nlink, 2, "two names of one inode stay");
    w.unlink(1, "a").unwrap();
    assert_eq!(w.attr(ino).unwrap().nlink, 1);
    let (names, end) = w.run(w.fs.next_backrefs(ino, 0, 0, 9)).unwrap();
    assert!(end && names.len() == 1 && names[0].0 == dir);
    let path = w.run(w.fs.path(ino, 0, 0)).unwrap();
    assert_eq!(path, [&b"d"[..], b"b"]);
    w.check();
}

#[test]
fn rename_keeps_the_tree_a_tree() {
    let w = World::new(2);
    let a = w.mkdir(1, "a").unwrap();
    let b = w.mkdir(a, "b").unwrap();
    let c = w.mkdir(b, "c").unwrap();
    assert_eq!(w.rename(1, "a", c, "x", 0), Err(E::EINVAL));
    assert_eq!(w.rename(1, "a", a, "x", 0), Err(E::EINVAL));
    assert_eq!(w.rename(b, "c", 1, "a", 0), Err(E::ENOTEMPTY));
    w.file(b, "f");
    assert_eq!(w.rename(b, "f", 1, "a", 0), Err(E::ENOTEMPTY));
    assert_eq!(w.rename(b, "f", b, "c", 0), Err(E::EISDIR));
    assert_eq!(w.rename(b, "c", b, "f", 0), Err(E::ENOTDIR));
    assert_eq!(w.rename(1, "a", 1, "z", 2), Err(E::EINVAL));
    assert_eq!(
        w.rename(b, "f", 1, "a", 1),
        Err(E::ENOTEMPTY),
        "the path is checked first"
    );
    w.rename(b, "c", 1, "c", 0).unwrap();
    assert_eq!((w.attr(1).unwrap().nlink, w.attr(b).unwrap().nlink), (4, 2));
    w.rename(1, "c", a, "b2", 0).unwrap();
    assert_eq!(w.rename(a, "b2", a, "b", 0), Err(E::ENOTEMPTY));
    assert_eq!(w.rename(a, "b2", a, "b", 1), Err(E::EEXIST));
    w.check();
    assert_eq!(w.run(w.fs.lookup(&ROOT, c, b"..")).unwrap().attr.ino, a);
}

#[test]
fn readdir_goes_on_where_it_was() {
    let w = World::new(2);
    let dir = w.mkdir(1, "d").unwrap();
    for n in 0..10 {
        w.file(dir, &format!("f{n}"));
    }
    w.unlink(dir, "f3").unwrap();
    let all = w.list(dir);
    assert_eq!(all[0], (".".into(), dir, 1));
    assert_eq!(all[1], ("..".into(), ROOT_INO, 2));
    assert_eq!(all[4].2, 6, "the position of the next existing entry");
    assert_eq!(all.last().unwrap().2, 12, "one past the last");
    for (at, (_, _, next)) in all.iter().enumerate() {
        let mut rest = Vec::new();
        w.run(w.fs.readdir(&ROOT, dir, 0, *next, true, &mut |e| {
            assert!(e.entry.is_none_or(|entry| entry.attr.ino == e.ino));
            rest.push(e.name.to_vec());
            true
        }))
        .unwrap();
        let names: Vec<_> = all[at + 1..]
            .iter()
            .map(|e| e.0.as_bytes().to_vec())
            .collect();
        assert_eq!(rest, names);
    }
}

#[test]
fn symlinks_hold_any_target() {
    let w = World::new(2);
    for len in [1, 895, 896, 1791, 1792, 4095] {
        let target = "t".repeat(len);
        let name = format!("s{len}");
        let entry = w
            .run(w.fs.symlink(&ROOT, 1, name.as_bytes(), target.as_bytes()))
            .unwrap();
        assert_eq!(entry.attr.size, len as u64 + 1);
        assert_eq!(entry.attr.mode & 0o7777, 0o777);
        assert_eq!(
            w.run(w.fs.readlink(&ROOT, entry.attr.ino)).unwrap(),
            target.as_bytes()
        );
        w.unlink(1, &name).unwrap();
        w.check();
    }
    assert_eq!(
        w.run(w.fs.symlink(&ROOT, 1, b"s", &[b'x'; 4096])),
        Err(E::ENAMETOOLONG)
    );
    assert_eq!(w.run(w.fs.symlink(&ROOT, 1, b"s", b"")), Err(E::ENOENT));
    assert_eq!(w.run(w.fs.readlink(&ROOT, 1)), Err(E::EINVAL));
}

#[test]
fn groups_follow_a_setgid_directory() {
    let w = World::new(2);
    let dir = w.mkdir(1, "d").unwrap();
    let set = SetAttr {
        mode: Some(0o2777),
        gid: Some(50),
        ..SetAttr::default()
    };
    w.run(w.fs.setattr(&ROOT, dir, &set)).unwrap();
    let cx = user(7, 8);
    let sub = w.run(w.fs.mkdir(&cx, dir, b"sub", 0o755, 0)).unwrap().attr;
    assert_eq!((sub.uid, sub.gid, sub.mode), (7, 50, S_IFDIR | 0o2755));
    let file = w
        .run(w.fs.mknod(&cx, dir, b"f", S_IFREG | 0o2755, 0, 0))
        .unwrap()
        .attr;
    assert_eq!(
        (file.gid, file.mode),
        (50, S_IFREG | 0o755),
        "not in the group"
    );
    let plain = w
        .run(w.fs.mknod(&cx, 1, b"p", S_IFIFO | 0o666, 0, 0o27))
        .unwrap()
        .attr;
    assert_eq!((plain.gid, plain.mode), (8, S_IFIFO | 0o640));
    let dev = w
        .run(w.fs.mknod(&ROOT, 1, b"null", 0o020666, 1 << 20 | 3, 0))
        .unwrap()
        .attr;
    assert_eq!(dev.rdev, 0x0010_0003);
    w.check();
}

#[test]
fn setattr_strips_and_stamps() {
    let w = World::new(2);
    let ino = w.file(1, "f");
    w.set(ino, "security.capability", b"cap").unwrap();
    let mode = SetAttr {
        mode: Some(0o6755),
        ..SetAttr::default()
    };
    assert_eq!(
        w.run(w.fs.setattr(&ROOT, ino, &mode)).unwrap().0.mode & 0o7777,
        0o6755
    );
    let owner = SetAttr {
        uid: Some(9),
        ..SetAttr::default()
    };
    let attr = w.run(w.fs.setattr(&ROOT, ino, &owner)).unwrap().0;
    assert_eq!((attr.mode & 0o7777, attr.uid), (0o755, 9));
    assert_eq!(w.get(ino, "security.capability"), Err(E::ENODATA));
    let at = WallTime { sec: -5, nsec: 7 };
    let times = SetAttr {
        mtime: Some(SetTime::At(at)),
        atime: Some(SetTime::Now),
        ..SetAttr::default()
    };
    let attr = w.run(w.fs.setattr(&ROOT, ino, &times)).unwrap().0;
    assert_eq!(attr.mtime, at);
    let size = SetAttr {
        size: Some(1),
        ..SetAttr::default()
    };
    assert_eq!(w.run(w.fs.setattr(&ROOT, 1, &size)), Err(E::EISDIR));
    w.check();
}

#[test]
fn retention_forbids_change_but_not_links() {
    let w = World::new(2);
    let ino = w.file(1, "f");
    w.file(1, "g");
    w.set(ino, "user.a", b"1").unwrap();
    w.set_flags(ino, 2);
    assert_eq!(w.unlink(1, "f"), Err(E::EPERM));
    assert_eq!(w.rename(1, "f", 1, "h", 0), Err(E::EPERM));
    assert_eq!(w.rename(1, "g", 1, "f", 0), Err(E::EPERM));
    let mode = SetAttr {
        mode: Some(0o600),
        ..SetAttr::default()
    };
    assert_eq!(w.run(w.fs.setattr(&ROOT, ino, &mode)), Err(E::EPERM));
    assert_eq!(w.set(ino, "user.a", b"2"), Err(E::EPERM));
    assert_eq!(w.remove(ino, "user.a"), Err(E::EPERM));
    w.set(ino, "trusted.a", b"2").unwrap();
    w.run(w.fs.link(&ROOT, ino, 1, b"link")).unwrap();
    w.check();
}

#[test]
fn xattrs_of_every_size_come_back() {
    let w = World::new(2);
    let ino = w.file(1, "f");
    let sizes = [
        0, 1, 879, 880, 881, 1775, 1776, 5000, 65535, 900, 3, 65535, 0,
    ];
    for (n, size) in sizes.into_iter().enumerate() {
        let value = vec![n as u8; size];
        w.set(ino, "user.test", &value).unwrap();
        assert_eq!(w.get(ino, "user.test").unwrap(), value);
        w.check();
    }
    assert_eq!(w.set(ino, "user.test", &[0; 65536]), Err(E::E2BIG));
    assert_eq!(w.names(ino), ["user.test"]);
    w.remove(ino, "user.test").unwrap();
    assert_eq!(w.remove(ino, "user.test"), Err(E::ENODATA));
    assert_eq!(w.get(ino, "user.test"), Err(E::ENODATA));
    w.check();
    let value = w.run(w.fs.setxattr(&ROOT, ino, b"user.x", b"", XattrSet::Replace));
    assert_eq!(value, Err(E::ENODATA));
    w.set(ino, "user.x", b"").unwrap();
    let value = w.run(w.fs.setxattr(&ROOT, ino, b"user.x", b"", XattrSet::Create));
    assert_eq!(value, Err(E::EEXIST));
}

#[test]
fn the_first_xattr_has_the_bytes_of_the_spec() {
    let w = World::new(2);
    let ino = w.file(1, "f");
    w.set(ino, "user.test", b"value").unwrap();
    let key = Key::xattr(ino, 0xf217_78d1, 0, 0);
    let value = [&[5, 0, 9, 0, 0, 0, 0, 0], &b"user.testvalue"[..]].concat();
    assert_eq!(w.log.items.borrow()[&key], value[..]);
}

#[test]
fn xattr_names_have_their_namespaces() {
    let w = World::new(2);
    let ino = w.file(1, "f");
    for (name, error) in [
        ("user.", E::EINVAL),
        ("trusted.", E::EINVAL),
        ("system.foo", E::EOPNOTSUPP),
        ("nodot", E::EOPNOTSUPP),
        ("scoutfs.foobar", E::EINVAL),
        ("scoutfs.hide.hide.x", E::EINVAL),
        ("scoutfs.totl.a.b.1.2", E::EINVAL),
        ("scoutfs.indx.t.256.1", E::EINVAL),
    ] {
        assert_eq!(w.set(ino, name, b"1"), Err(error), "{name}");
    }
    let fifo = w
        .run(w.fs.mknod(&ROOT, 1, b"p", S_IFIFO, 0, 0))
        .unwrap()
        .attr
        .ino;
    assert_eq!(w.set(fifo, "user.a", b""), Err(E::EPERM));
    w.set(fifo, "trusted.a", b"").unwrap();
    w.set(ino, "scoutfs.hide.a", b"").unwrap();
    w.set(ino, "scoutfs.foo", b"").unwrap();
    let denied = w.run(w.fs.setxattr(&user(5, 5), ino, b"scoutfs.hide.b", b"", XattrSet::Any));
    assert_eq!(denied, Err(E::EPERM));
    assert_eq!(w.names(ino), ["scoutfs.foo"]);
    w.check();
}

#[test]
fn totals_and_indexes_follow_their_xattrs() {
    let w = World::new(2);
    let (a, b) = (w.file(1, "a"), w.file(1, "b"));
    w.set(a, "scoutfs.totl.t.1.2.3", b"10").unwrap();
    w.set(b, "scoutfs.totl.x.1.2.3", b"5").unwrap();
    w.check();
    w.set(a, "scoutfs.totl.t.1.2.3", b"7").unwrap();
    w.check();
    assert_eq!(w.set(a, "scoutfs.totl.t.1.2.3", b"x"), Err(E::EINVAL));
    w.set(a, "scoutfs.indx.t.5.100", b"").unwrap();
    w.set(a, "scoutfs.indx.t.5.100", b"").unwrap();
    w.set(a, "scoutfs.indx.u.5.100", b"").unwrap();
    assert_eq!(w.set(a, "scoutfs.indx.v.5.100", b"1"), Err(E::EINVAL));
    w.check();
    w.remove(a, "scoutfs.indx.u.5.100").unwrap();
    w.check();
    w.unlink(1, "a").unwrap();
    w.unlink(1, "b").unwrap();
    w.check();
    let zones: BTreeSet<u8> = w.log.items.borrow().keys().map(|k| k.zone).collect();
    assert_eq!(
        zones,
        BTreeSet::from([format::ZONE_INODE_INDEX, format::ZONE_FS])
    );
}

fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut out = vec![2, 0, 0, 0];
    for (tag, perm, id) in entries {
        out.extend_from_slice(&tag.to_le_bytes());
        out.extend_from_slice(&perm.to_le_bytes());
        out.extend_from_slice(&id.to_le_bytes());
    }
    out
}

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";
const NO: u32 = u32::MAX;

#[test]
fn acls_and_modes_follow_each_other() {
    let w = World::new(2);
    let ino = w.file(1, "f");
    let full = acl(&[
        (1, 6, NO),
        (2, 4, 1000),
        (4, 4, NO),
        (16, 6, NO),
        (32, 0, NO),
    ]);
    w.set(ino, ACCESS, &full).unwrap();
    assert_eq!(w.attr(ino).unwrap().mode & 0o777, 0o660);
    assert_eq!(w.get(ino, ACCESS).unwrap(), full);
    let chmod = SetAttr {
        mode: Some(0o751),
        ..SetAttr::default()
    };
    w.run(w.fs.setattr(&ROOT, ino, &chmod)).unwrap();
    let expected = acl(&[
        (1, 7, NO),
        (2, 4, 1000),
        (4, 4, NO),
        (16, 5, NO),
        (32, 1, NO),
    ]);
    assert_eq!(w.get(ino, ACCESS).unwrap(), expected);
    let base = acl(&[(1, 6, NO), (4, 0, NO), (32, 0, NO)]);
    w.set(ino, ACCESS, &base).unwrap();
    assert_eq!(w.get(ino, ACCESS), Err(E::ENODATA));
    assert_eq!(w.attr(ino).unwrap().mode & 0o777, 0o600);
    w.remove(ino, ACCESS).unwrap();
    assert_eq!(w.set(ino, DEFAULT, &base), Err(E::EINVAL));
    assert_eq!(w.set(ino, ACCESS, &base[..12]), Err(E::EINVAL));
    let denied = w.run(w.fs.setxattr(&user(5, 5), ino, ACCESS.as_bytes(), &base, XattrSet::Any));
    assert_eq!(denied, Err(E::EPERM));
    w.check();
}

#[test]
fn a_default_acl_replaces_the_umask() {
    let w = World::new(2);
    let dir = w.mkdir(1, "d").unwrap();
    let default = acl(&[
        (1, 7, NO),
        (2, 7, 1000),
        (4, 5, NO),
        (16, 7, NO),
        (32, 5, NO),
    ]);
    w.set(dir, DEFAULT, &default).unwrap();
    let ino = w.file(dir, "f");
    assert_eq!(
        w.attr(ino).unwrap().mode & 0o777,
        0o664,
        "the umask is not applied"
    );
    let access = acl(&[
        (1, 6, NO),
        (2, 7, 1000),
        (4, 5, NO),
        (16, 6, NO),
        (32, 4, NO),
    ]);
    assert_eq!(w.get(ino, ACCESS).unwrap(), access);
    assert_eq!(w.get(ino, DEFAULT), Err(E::ENODATA));
    let sub = w.mkdir(dir, "sub").unwrap();
    assert_eq!(w.get(sub, DEFAULT).unwrap(), default);
    assert_eq!(w.attr(sub).unwrap().mode & 0o777, 0o775);
    let link = w
        .run(w.fs.symlink(&ROOT, dir, b"s", b"t"))
        .unwrap()
        .attr
        .ino;
    assert_eq!(w.get(link, ACCESS), Err(E::ENODATA));
    let base = acl(&[(1, 7, NO), (4, 0, NO), (32, 0, NO)]);
    w.set(dir, DEFAULT, &base).unwrap();
    let ino = w.file(dir, "g");
    assert_eq!(w.attr(ino).unwrap().mode & 0o777, 0o600);
    assert_eq!(w.get(ino, ACCESS), Err(E::ENODATA));
    w.check();
}

#[test]
fn the_scan_deletes_what_nobody_has_open() {
    let w = World::new(2);
    let (kept, kept_fh) = w.create(1, "kept").unwrap();
    let elsewhere = w.file(1, "elsewhere");
    w.server.open_elsewhere.borrow_mut().insert(elsewhere);
    w.unlink(1, "kept").unwrap();
    w.unlink(1, "elsewhere").unwrap();
    assert!(w.attr(elsewhere).is_ok());
    assert!(!w.run(w.fs.scan_orphans()));
    let counters = w.fs.orphan_counters();
    assert_eq!(
        (counters.scan_cached.get(), counters.scan_omap_set.get()),
        (1, 1)
    );
    w.server.open_elsewhere.borrow_mut().clear();
    // The answer is good for one grant: taking the lock back ends it.
    w.run(w.fs.revoke(Scope::InodeGroup(elsewhere), Mode::Null));
    w.run(w.fs.scan_orphans());
    assert_eq!(w.attr(elsewhere), Err(E::ESTALE));
    w.run(w.fs.release(kept, kept_fh));
    assert_eq!(w.attr(kept), Err(E::ESTALE));
    assert!(w.run(w.fs.scan_orphans()));
    assert_eq!(counters.inode_deleted.get(), 2);
    w.check();
}

#[test]
fn a_revoked_group_is_forgotten_by_the_kernel() {
    let w = World::new(2);
    let dir = w.mkdir(1, "d").unwrap();
    let file = w.file(dir, "f");
    w.run(w.fs.revoke(Scope::InodeGroup(file), Mode::Null));
    assert_eq!(w.kernel.0.take(), [Inval::Attr(file)]);
    w.run(w.fs.revoke(Scope::InodeGroup(dir), Mode::Null));
    assert_eq!(w.kernel.0.take(), [Inval::AllNames, Inval::Attr(dir)]);
    w.run(w.fs.revoke(Scope::InodeGroup(1), Mode::Null));
    // Nobody was told anything of the root that could be believed.
    assert_eq!(w.kernel.0.take(), [Inval::AllNames]);
    w.fs.forget(file, 1);
    w.run(w.fs.revoke(Scope::InodeGroup(file), Mode::Null));
    w.run(w.fs.revoke(Scope::Orphans, Mode::Null));
    assert!(w.kernel.0.take().is_empty());
}

#[test]
fn old_volumes_keep_short_inodes() {
    let w = World::new(1);
    let ino = w.file(1, "f");
    assert_eq!(w.log.items.borrow()[&Key::inode(ino)].len(), 160);
    assert_eq!(w.set(ino, "scoutfs.indx.t.5.100", b""), Err(E::EOPNOTSUPP));
}

#[test]
fn entry_types_are_shown_as_stat_types() {
    let w = World::new(2);
    w.run(w.fs.mknod(&ROOT, 1, b"p", S_IFIFO, 0, 0)).unwrap();
    let mut seen = Vec::new();
    w.run(w.fs.readdir(&ROOT, 1, 0, 2, false, &mut |e| {
        seen.push(u32::from(e.dtype) << 12);
        true
    }))
    .unwrap();
    assert_eq!(seen, [S_IFIFO & S_IFMT]);
}
