//! Volumes made by the original, mounted by us: every path reads back exactly as
//! the original's manifest says, after a clean unmount and after a crash.

use super::{Mount, NodeConfig};
use crate::env::testing::TestWorld;
use crate::env::testnet::{TestNet, TestNetHandle};
use crate::env::{Env, Gate, LocalBoxFuture, WallTime};
use crate::errno::Errno;
use crate::fs::api::{Archive, Caller, IndexEntry, InodeIndex, Inval, KernelCache, Posix};
use crate::fs::{Fs, Inode};
use crate::locks::Mode;
use crate::server::{FenceAgent, FenceError, FenceRequest};
use crate::volume::golden::golden;
use bytes::Bytes;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::rc::Rc;
use std::sync::Arc;

struct NoKernel;

impl KernelCache for NoKernel {
    fn invalidate(&self, _: Vec<Inval>) -> LocalBoxFuture<'static, Vec<Inval>> {
        Box::pin(std::future::ready(Vec::new()))
    }
}

/// The volumes' mounts were in machines that do not exist any more.
struct AssumeDead;

impl FenceAgent for AssumeDead {
    fn fence(&self, _: &Env, _: FenceRequest) -> LocalBoxFuture<'static, Result<(), FenceError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

fn lines(name: &str) -> Vec<String> {
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    let file = std::fs::File::open(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let mut text = String::new();
    if name.ends_with(".zst") {
        let mut stream = ruzstd::decoding::StreamingDecoder::new(file).expect("a zstd stream");
        stream
            .read_to_string(&mut text)
            .expect("a manifest is text");
    } else {
        std::io::BufReader::new(file)
            .read_to_string(&mut text)
            .expect("text");
    }
    text.lines().map(str::to_owned).collect()
}

fn manifest(name: &str) -> BTreeMap<Vec<u8>, Value> {
    let path_of = |v: &Value| match v["path_hex"].as_str() {
        Some(hex) => unhex(hex),
        None => v["path"].as_str().expect("a path").as_bytes().to_vec(),
    };
    lines(name)
        .iter()
        .map(|line| serde_json::from_str::<Value>(line).expect("a JSON object"))
        .map(|v| (path_of(&v), v))
        .collect()
}

fn unhex(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2)
        .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Nanoseconds as the manifest's numbers are read: far times do not fit an i64.
fn nanos(time: WallTime) -> Value {
    let nanos = i128::from(time.sec) * 1_000_000_000 + i128::from(time.nsec);
    serde_json::from_str(&nanos.to_string()).expect("a number")
}

struct Walker {
    fs: Rc<Fs>,
    cx: Caller,
    found: BTreeMap<Vec<u8>, BTreeMap<&'static str, Value>>,
}

impl Walker {
    async fn walk(&mut self) {
        let mut todo = vec![(b"/".to_vec(), 1)];
        while let Some((path, ino)) = todo.pop() {
            let inode = self.load(ino).await;
            if inode.is_dir() {
                for (name, child) in self.entries(ino).await {
                    let mut below = path.clone();
                    if path != b"/" {
                        below.push(b'/');
                    }
                    below.extend_from_slice(&name);
                    let entry = self
                        .fs
                        .lookup(&self.cx, ino, &name)
                        .await
                        .expect("a listed name");
                    assert_eq!(entry.attr.ino, child, "{}", String::from_utf8_lossy(&below));
                    todo.push((below, child));
                }
            }
            let seen = self.describe(&inode).await;
            self.found.insert(path, seen);
        }
    }

    async fn load(&self, ino: u64) -> Inode {
        let locked = self
            .fs
            .lock_inodes(&[ino], Mode::Read)
            .await
            .expect("a lock");
        self.fs
            .load(&locked, ino)
            .await
            .expect("the inode of an entry")
    }

    async fn entries(&self, ino: u64) -> Vec<(Bytes, u64)> {
        let dir = self.fs.opendir(&self.cx, ino, 0).await.expect("opendir");
        let mut found = Vec::new();
        let mut at = 0;
        loop {
            let before = found.len();
            let from = at;
            let mut room = 100;
            let mut sink = |entry: crate::fs::api::DirEntry| {
                if room == 0 {
                    return false;
                }
                room -= 1;
                at = entry.next;
                found.push((entry.name, entry.ino));
                true
            };
            let read = self
                .fs
                .readdir(&self.cx, ino, dir.fh, from, false, &mut sink);
            read.await.expect("readdir");
            if found.len() == before {
                break;
            }
        }
        self.fs.releasedir(ino, dir.fh).await;
        found.retain(|(name, _)| name != "." && name != "..");
        found
    }

    async fn describe(&self, inode: &Inode) -> BTreeMap<&'static str, Value> {
        let ino = inode.ino;
        let attr = self.fs.getattr(&self.cx, ino).await.expect("getattr").0;
        let mut seen: BTreeMap<&'static str, Value> = BTreeMap::new();
        seen.insert("ino", attr.ino.into());
        seen.insert("mode", format!("{:04o}", attr.mode & 0o7777).into());
        seen.insert("uid", attr.uid.into());
        seen.insert("gid", attr.gid.into());
        seen.insert("size", attr.size.into());
        seen.insert("nlink", attr.nlink.into());
        seen.insert("blocks", attr.blocks.into());
        seen.insert("mtime_ns", nanos(attr.mtime));
        seen.insert("ctime_ns", nanos(attr.ctime));
        let kind = match attr.mode & 0o170_000 {
            0o100_000 => "reg",
            0o040_000 => "dir",
            0o120_000 => "lnk",
            0o020_000 => "chr",
            0o060_000 => "blk",
            0o010_000 => "fifo",
            _ => "sock",
        };
        seen.insert("type", kind.into());
        if matches!(kind, "chr" | "blk") {
            seen.insert("rdev", vec![attr.rdev >> 20, attr.rdev & 0xf_ffff].into());
        }
        if kind == "lnk" {
            let target = self.fs.readlink(&self.cx, ino).await.expect("readlink");
            seen.insert("target", String::from_utf8_lossy(&target).into());
        }
        if matches!(kind, "reg" | "dir") {
            seen.insert("meta_seq", inode.meta_seq.into());
            seen.insert("data_seq", inode.data_seq.into());
            seen.insert("data_version", inode.data_version.into());
            seen.insert("online_blocks", inode.online_blocks.into());
            seen.insert("offline_blocks", inode.offline_blocks.into());
            seen.insert("crtime_ns", nanos(inode.crtime));
            seen.insert("retention", u32::from(inode.is_retained()).into());
            seen.insert("project_id", inode.proj.into());
        }
        if kind == "reg" {
            self.describe_data(inode, &mut seen).await;
        }
        seen
    }

    async fn describe_data(&self, inode: &Inode, seen: &mut BTreeMap<&'static str, Value>) {
        let ino = inode.ino;
        let extents = self
            .fs
            .fiemap(&self.cx, ino, 0, u64::MAX, usize::MAX)
            .await
            .expect("fiemap");
        let rows: Vec<Value> = extents
            .iter()
            .map(|e| vec![e.logical, e.physical, e.length, u64::from(e.flags)].into())
            .collect();
        seen.insert("fiemap", rows.into());
        if inode.offline_blocks != 0 || inode.size > 64 << 20 {
            return;
        }
        let open = self.fs.open(&self.cx, ino, 0).await.expect("open");
        let mut digest = Sha256::new();
        let mut at = 0;
        while at < inode.size {
            let pieces = self
                .fs
                .read(&self.cx, ino, open.fh, at, 1 << 20)
                .await
                .expect("read");
            let len: usize = pieces.iter().map(Bytes::len).sum();
            assert_ne!(len, 0, "a short file");
            pieces.iter().for_each(|piece| digest.update(piece));
            at += len as u64;
        }
        self.fs.release(ino, open.fh).await;
        seen.insert("sha256", hex(&digest.finalize()).into());
    }

    async fn compare_xattrs(&self, ino: u64, expected: &Value, path: &str) {
        let empty = serde_json::Map::new();
        let expected = expected.as_object().unwrap_or(&empty);
        let listed = self.fs.listxattr(&self.cx, ino).await.expect("listxattr");
        for name in listed.split(|b| *b == 0).filter(|name| !name.is_empty()) {
            let name = String::from_utf8_lossy(name);
            assert!(
                expected.contains_key(&*name),
                "{path} lists {name}, the original does not"
            );
        }
        for (name, value) in expected {
            let found = self.fs.getxattr(&self.cx, ino, name.as_bytes()).await;
            let found = found.unwrap_or_else(|e| panic!("{path} xattr {name}: {e}"));
            assert_eq!(hex(&found), value.as_str().unwrap(), "{path} xattr {name}");
        }
        let absent = self.fs.getxattr(&self.cx, ino, b"user.not-there").await;
        assert_eq!(absent, Err(Errno::ENODATA));
    }
}

fn world(name: &str) -> TestWorld {
    let net = Rc::new(TestNetHandle(Rc::new(TestNet::default())));
    let volume = golden(name);
    TestWorld::over(7, volume.meta, volume.data, net)
}

async fn mount(env: &Env) -> Rc<Mount> {
    let config = NodeConfig::new(Some(0), Arc::new(AssumeDead));
    let mounted = Mount::start(env, 0x5eed, config, Rc::new(NoKernel), &Gate::default()).await;
    mounted.unwrap_or_else(|error| panic!("mount: {error}"))
}

/// Compares everything found with the manifest, path by path.
async fn compare(mount: &Mount, name: &str, changed_by_mounting: &[&str]) {
    let expected = manifest(name);
    let mut walker = Walker {
        fs: mount.fs().clone(),
        cx: Caller::default(),
        found: BTreeMap::new(),
    };
    walker.walk().await;
    for (path, want) in &expected {
        let shown = String::from_utf8_lossy(path).into_owned();
        let Some(seen) = walker.found.get(path) else {
            panic!("{shown} is missing")
        };
        for (field, found) in seen {
            if changed_by_mounting.contains(field) {
                continue;
            }
            assert_eq!(found, &want[*field], "{shown}: {field}");
        }
        walker
            .compare_xattrs(want["ino"].as_u64().unwrap(), &want["xattrs"], &shown)
            .await;
    }
    compare_indexes(mount, &expected).await;
    for path in walker.found.keys() {
        let shown = String::from_utf8_lossy(path);
        assert!(
            expected.contains_key(path),
            "{shown} is not in the manifest"
        );
    }
}

/// Every inode that has a path is in the indexes, at the seq that the manifest says (it
/// says none of links and special files).
async fn compare_indexes(mount: &Mount, expected: &BTreeMap<Vec<u8>, Value>) {
    for (index, field, kinds) in [
        (InodeIndex::MetaSeq, "meta_seq", &["reg", "dir"][..]),
        (InodeIndex::DataSeq, "data_seq", &["reg"][..]),
    ] {
        let (first, last) = (IndexEntry::default(), IndexEntry::LAST);
        let walk = mount.fs().walk_inodes(index, first, last, usize::MAX);
        let mut listed = walk.await.expect("a walk");
        assert!(listed.is_sorted());
        let of_kind = |v: &&Value| kinds.contains(&v["type"].as_str().expect("a type"));
        let mut wanted: Vec<IndexEntry> = expected
            .values()
            .filter(of_kind)
            .map(|v| IndexEntry {
                major: v[field].as_u64().expect("a seq"),
                ino: v["ino"].as_u64().expect("a number"),
            })
            .collect();
        wanted.sort_unstable();
        wanted.dedup();
        // Links and special files are listed, too, but by `data_seq`.
        let known: BTreeSet<u64> = wanted.iter().map(|entry| entry.ino).collect();
        let all: BTreeSet<u64> = expected
            .values()
            .filter_map(|v| v["ino"].as_u64())
            .collect();
        assert_eq!(
            listed
                .iter()
                .map(|entry| entry.ino)
                .collect::<BTreeSet<_>>(),
            match index {
                InodeIndex::MetaSeq => all,
                InodeIndex::DataSeq => known.clone(),
            }
        );
        listed.retain(|entry| known.contains(&entry.ino));
        assert_eq!(listed, wanted);
    }
}

#[test]
fn the_populated_volume_reads_back_as_its_manifest_says() {
    let world = world("b");
    let env = world.env();
    world.block_on(async {
        let mount = mount(&env).await;
        compare(&mount, "b.manifest.jsonl.zst", &[]).await;
        mount.unmount().await.expect("a clean unmount");
    });
}

#[test]
fn the_crash_image_recovers_as_the_original_recovered_it() {
    let world = world("c1");
    let env = world.env();
    world.block_on(async {
        let mount = mount(&env).await;
        compare(&mount, "recovered.manifest.jsonl.zst", &[]).await;
        mount.unmount().await.expect("a clean unmount");
    });
}
