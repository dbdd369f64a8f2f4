//! Bursts of operations and faults, by theme: what a stressed world does besides
//! what its seed would do anyway.
//!
//! What can go wrong: a world of a theme that never gets to what it is about. The
//! probes that `sweep --stress` prints tell.

use super::Theme;
use crate::plan::{
    Config, Device, DiskFault, DiskOp, End, Fault, LifePlan, Loss, PlanOp, When, Window,
};
use crate::rng::Stream;

/// Names that only bursts use.
const BURST_NAMES: u8 = 100;
const SECOND: u64 = 1_000_000_000;

/// Adds bursts to the lives of a stressed world.
pub fn add_bursts(seed: u64, config: &mut Config, lives: &mut Vec<LifePlan>) {
    let rng = Stream::new(seed, "bursts", 0);
    match Theme::draw(seed) {
        None => return,
        Some(Theme::Mixed) => mix(&rng, lives),
        Some(theme) => {
            if rng.chance(600) {
                // Answers come from the filesystem, not from the kernel's caches.
                config.kernel_caches = false;
                config.kernel_locks = rng.chance(600);
            }
            shorten(&rng, lives);
            play(theme, &rng, lives);
        }
    }
    let failing = |fault: &Fault| matches!(fault, Fault::Disk(DiskFault::Error { .. }));
    let fails = lives.iter().any(|life| life.faults.iter().any(failing));
    if config.stress.tight || fails {
        keep_sizes(lives);
    }
}

/// Leaves some of what the seed drew, so that no two worlds of a theme begin alike.
fn shorten(rng: &Stream, lives: &mut Vec<LifePlan>) {
    lives.truncate(2);
    for life in lives {
        life.windows.truncate(rng.below(3) as usize);
    }
}

fn play(theme: Theme, rng: &Stream, lives: &mut Vec<LifePlan>) {
    let acts = 1 + rng.below(2);
    for _ in 0..acts {
        let at = rng.below(lives.len() as u64 + 1) as usize;
        let act = match theme {
            Theme::Mixed => Vec::new(),
            Theme::Torn => torn(rng),
            Theme::Flaky => flaky(rng),
            Theme::Unflushed => unflushed(rng),
            Theme::Fat => fat(rng, false),
            Theme::Worn => fat(rng, true),
            Theme::Merging => merging(rng),
            Theme::Severed => severed(rng),
            Theme::Late => late(rng),
            Theme::Outrun => outrun(rng),
            Theme::Bereft => bereft(rng),
            Theme::Reuse => reuse(rng),
        };
        lives.splice(at..at, act);
    }
}

/// Any bursts in any life.
fn mix(rng: &Stream, lives: &mut [LifePlan]) {
    let mut torn = false;
    for number in 0..lives.len() {
        let last = number + 1 == lives.len();
        let life = &mut lives[number];
        if std::mem::take(&mut torn) {
            life.windows.insert(0, grow_everything(rng));
        }
        if !rng.chance(500) {
            continue;
        }
        let at = rng.below(life.windows.len() as u64 + 1) as usize;
        let burst = match rng.below(3) {
            0 => churn(rng),
            1 => hot_objects(rng),
            _ if last => hot_objects(rng),
            _ => {
                torn = true;
                life.end = End::PowerLoss(When::Operations(u32::MAX), loss(rng));
                torn_truncates(rng)
            }
        };
        life.windows.splice(at..at, burst);
        if torn {
            // What follows the burst would outlive the crash it is about.
            life.windows.truncate(at + 2);
        }
    }
}

fn life(windows: Vec<Window>, faults: Vec<Fault>, end: End) -> LifePlan {
    LifePlan {
        windows,
        faults,
        end,
    }
}

fn window(tasks: Vec<Vec<PlanOp>>, sync: bool, audit: bool) -> Window {
    Window { tasks, sync, audit }
}

/// Deals operations to tasks in turn.
fn deal(ops: Vec<PlanOp>, hands: usize) -> Vec<Vec<PlanOp>> {
    let mut tasks = vec![Vec::new(); hands];
    for (n, op) in ops.into_iter().enumerate() {
        tasks[n % hands].push(op);
    }
    tasks
}

fn pause(micros: u32) -> PlanOp {
    PlanOp::Pause { micros }
}

fn create(number: u8) -> PlanOp {
    PlanOp::Create {
        dir: 0,
        name: BURST_NAMES + number,
        excl: false,
        hold: false,
    }
}

fn loss(rng: &Stream) -> Loss {
    rng.pick(&[
        Loss::AllUnflushed,
        Loss::Nothing,
        Loss::Sectors,
        Loss::Writes,
    ])
}

/// A power loss, or a kill, when the operations say [`PlanOp::Doom`].
fn doomed(rng: &Stream) -> End {
    let when = When::Operations(u32::MAX);
    match rng.below(4) {
        0 => End::Kill(when),
        _ => End::PowerLoss(when, loss(rng)),
    }
}

fn any(rng: &Stream) -> u16 {
    rng.below(1 << 16) as u16
}

/// A growing fallocate that runs out of space, or meets an error, may stop anywhere.
fn keep_sizes(lives: &mut [LifePlan]) {
    let windows = lives.iter_mut().flat_map(|life| &mut life.windows);
    for op in windows.flat_map(|window| window.tasks.iter_mut().flatten()) {
        if let PlanOp::Fallocate { keep, .. } = op {
            *keep = true;
        }
    }
}

/// Truncates cut off by a crash, then everything is made longer.
fn torn(rng: &Stream) -> Vec<LifePlan> {
    let after = life(vec![grow_everything(rng)], Vec::new(), End::Unmount);
    vec![life(torn_truncates(rng), Vec::new(), doomed(rng)), after]
}

/// Errors of a device, from `from` on for `lasting` nanoseconds.
fn errors(device: Device, op: DiskOp, from: u64, lasting: u64, permille: u32) -> Fault {
    Fault::Disk(DiskFault::Error {
        device,
        op,
        from,
        until: from + lasting,
        times: 1000,
        permille,
    })
}

/// The same few items change again and again while commits fail.
fn flaky(rng: &Stream) -> Vec<LifePlan> {
    let from = 300_000_000 + rng.below(SECOND);
    let op = rng.pick(&[DiskOp::Write, DiskOp::Flush, DiskOp::Flush]);
    let device = rng.pick(&[Device::Meta, Device::Meta, Device::Data]);
    let lasting = (2 + rng.below(10)) * SECOND;
    let faults = vec![errors(
        device,
        op,
        from,
        lasting,
        rng.pick(&[200, 500, 800]),
    )];
    let objects: Vec<u16> = (0..4).map(|_| any(rng)).collect();
    let change = |_| match rng.below(6) {
        0 => PlanOp::Chmod {
            obj: rng.pick(&objects),
            mode: rng.below(0o1000) as u16,
        },
        1 => PlanOp::Write {
            file: rng.pick(&objects),
            offset: rng.below(4) * 4096,
            len: 4096,
            sync: false,
        },
        2 => PlanOp::Removexattr {
            obj: rng.pick(&objects),
            name: rng.below(3) as u8,
        },
        3 => pause(1000),
        _ => PlanOp::Setxattr {
            obj: rng.pick(&objects),
            name: rng.below(3) as u8,
            len: rng.pick(&[5, 100, 896]),
            how: 0,
        },
    };
    let make = (0..6).map(create).chain([pause(1_500_000)]).collect();
    let mut windows = vec![window(vec![make], true, false)];
    for _ in 0..2 + rng.below(3) {
        let tasks = (0..3).map(|_| (0..12).map(change).collect()).collect();
        windows.push(window(tasks, true, rng.chance(300)));
    }
    let end = rng.pick(&[End::Unmount, End::Unmount, End::Kill(When::Operations(90))]);
    vec![life(windows, faults, end)]
}

/// Much is written and synced while flushes fail, and soon the power goes.
fn unflushed(rng: &Stream) -> Vec<LifePlan> {
    let from = 100_000_000 + rng.below(SECOND);
    let device = rng.pick(&[Device::Meta, Device::Data, Device::Data]);
    let lasting = rng.pick(&[SECOND, 20 * SECOND]);
    let faults = vec![errors(
        device,
        DiskOp::Flush,
        from,
        lasting,
        rng.pick(&[500, 1000]),
    )];
    let mut windows = vec![window(vec![(0..4).map(create).collect()], true, false)];
    let files: Vec<u16> = (0..4).map(|_| any(rng)).collect();
    let step = |file: u16| {
        let offset = rng.below(30) * 4096;
        let len = rng.pick(&[1000, 4096, 20_000]);
        [
            PlanOp::Write {
                file,
                offset,
                len,
                sync: rng.chance(200),
            },
            pause(rng.pick(&[10_000, 100_000])),
            match rng.below(3) {
                0 => PlanOp::Setxattr {
                    obj: file,
                    name: rng.below(3) as u8,
                    len: 896,
                    how: 0,
                },
                1 => PlanOp::Syncfs,
                _ => PlanOp::Fsync {
                    file,
                    datasync: rng.chance(500),
                },
            },
        ]
    };
    for _ in 0..3 {
        let task = |file: &u16| (0..5).flat_map(|_| step(*file)).collect();
        windows.push(window(files.iter().map(task).collect(), true, false));
    }
    let when = match rng.below(3) {
        0 => When::Operations(30 + rng.below(120) as u32),
        _ => When::Time(from + rng.below(5 * SECOND)),
    };
    let loss = rng.pick(&[Loss::AllUnflushed, Loss::AllUnflushed, Loss::Sectors]);
    vec![life(windows, faults, End::PowerLoss(when, loss))]
}

/// Values that fill leaves, in transactions that nobody ends by a sync; `again`
/// with syncs, so that the next one frees what the last one wrote.
fn fat(rng: &Stream, again: bool) -> Vec<LifePlan> {
    let files = 12;
    let mut windows = vec![window(vec![(0..files).map(create).collect()], again, false)];
    let value = |len: u16| PlanOp::Setxattr {
        obj: any(rng),
        name: rng.below(8) as u8,
        len,
        how: 0,
    };
    let rounds = if again { 5 } else { 2 };
    for _ in 0..rounds {
        let len = rng.pick(&[3000, 9000]);
        let ops: Vec<PlanOp> = (0..60).map(|_| value(len)).collect();
        windows.push(window(deal(ops, rng.pick(&[1, 4, 8])), again, false));
        if again {
            let wait = vec![
                pause(rng.pick(&[1000, 1_000_000, 6_000_000])),
                PlanOp::Syncfs,
            ];
            windows.push(window(vec![wait], true, false));
        }
    }
    let last = windows.len() - 1;
    windows[last].audit = true;
    vec![life(windows, Vec::new(), End::Unmount)]
}

/// Items and extents come and go until log trees are merged and freed; a crash
/// comes in the middle, or nobody disturbs it.
fn merging(rng: &Stream) -> Vec<LifePlan> {
    let mut windows = churn(rng);
    let files: Vec<u16> = (0..4).map(|_| any(rng)).collect();
    let mut ops = Vec::new();
    for n in 0..8u64 {
        ops.extend(files.iter().map(|file| PlanOp::Write {
            file: *file,
            offset: n * 8192,
            len: 4096,
            sync: false,
        }));
    }
    windows.insert(1, window(deal(ops, 2), true, false));
    let cuts = files.iter().map(|file| PlanOp::Truncate {
        file: *file,
        size: 0,
    });
    windows.push(window(vec![cuts.collect()], true, false));
    let doom = PlanOp::Doom {
        requests: 1 + rng.below(90) as u16,
    };
    let at = rng.below(windows.len() as u64) as usize;
    windows[at].tasks[0].insert(0, doom);
    let end = match rng.below(4) {
        0 => End::Unmount,
        _ => doomed(rng),
    };
    vec![life(windows, Vec::new(), end)]
}

/// Everybody waits for locks behind a broken network, then the mount is cut off.
fn severed(rng: &Stream) -> Vec<LifePlan> {
    let from = 200_000_000 + rng.below(SECOND);
    let faults = vec![Fault::Partition {
        from,
        until: from + SECOND + rng.below(4 * SECOND),
    }];
    let look = |_| {
        let obj = any(rng);
        [
            pause(rng.pick(&[10, 10_000, 100_000])),
            match rng.below(4) {
                0 => PlanOp::Chmod {
                    obj,
                    mode: rng.below(0o1000) as u16,
                },
                1 => PlanOp::Getxattr {
                    obj,
                    name: rng.below(3) as u8,
                },
                2 => PlanOp::Lookup {
                    dir: any(rng),
                    name: BURST_NAMES + rng.below(12) as u8,
                },
                _ => PlanOp::Listxattr { obj },
            },
        ]
    };
    let tasks = (0..6).map(|_| (0..30).flat_map(look).collect()).collect();
    let made = (0..12).map(create).collect();
    let windows = vec![window(vec![made], true, false), window(tasks, false, false)];
    let at = from + rng.below(2 * SECOND);
    vec![life(windows, faults, End::ForceUnmount(When::Time(at)))]
}

/// Few objects, many readers, and values and names that come, are committed and go.
fn late(rng: &Stream) -> Vec<LifePlan> {
    let objects: Vec<u16> = (0..3).map(|_| any(rng)).collect();
    let read = |_| {
        let obj = rng.pick(&objects);
        match rng.below(5) {
            0 => PlanOp::Getattr { obj },
            1 => PlanOp::Getxattr {
                obj,
                name: rng.below(3) as u8,
            },
            2 => PlanOp::Lookup {
                dir: 0,
                name: BURST_NAMES + rng.below(8) as u8,
            },
            3 => PlanOp::Readdir {
                dir: 0,
                plus: false,
            },
            _ => PlanOp::Listxattr { obj },
        }
    };
    let write = |_| {
        let (obj, name) = (rng.pick(&objects), rng.below(3) as u8);
        match rng.below(10) {
            0..=2 => PlanOp::Setxattr {
                obj,
                name,
                len: rng.pick(&[5, 100, 896]),
                how: 0,
            },
            3 | 4 => PlanOp::Removexattr { obj, name },
            5 => PlanOp::Unlink {
                dir: 0,
                name: BURST_NAMES + rng.below(8) as u8,
            },
            6 => create(rng.below(8) as u8),
            7 => PlanOp::Chmod {
                obj,
                mode: rng.below(0o1000) as u16,
            },
            _ => PlanOp::Syncfs,
        }
    };
    let mut windows = vec![window(vec![(0..8).map(create).collect()], true, false)];
    for _ in 0..5 {
        let mut tasks: Vec<Vec<PlanOp>> = (0..3).map(|_| (0..10).map(read).collect()).collect();
        tasks.push((0..16).map(write).collect());
        tasks.push((0..6).map(write).collect());
        windows.push(window(tasks, rng.chance(300), rng.chance(300)));
    }
    vec![life(windows, Vec::new(), End::Unmount)]
}

/// Files are written over in place and the process is killed in the middle; what the
/// next mount shows of that must outlive the power loss that comes soon.
fn bereft(rng: &Stream) -> Vec<LifePlan> {
    let files: Vec<u16> = (0..4).map(|_| any(rng)).collect();
    let write = |sync: bool| PlanOp::Write {
        file: rng.pick(&files),
        offset: rng.below(6) * 4096,
        len: rng.pick(&[4096, 8192, 20_000]),
        sync,
    };
    let made = (0..4).map(create).chain((0..12).map(|_| write(false)));
    let mut over: Vec<PlanOp> = (0..10).map(|_| write(false)).collect();
    over.push(PlanOp::Syncfs);
    let doom = |most| PlanOp::Doom {
        requests: 1 + rng.below(most) as u16,
    };
    over.insert(rng.below(10) as usize, doom(12));
    let first = life(
        vec![
            window(vec![made.collect()], true, false),
            window(vec![over], false, false),
        ],
        Vec::new(),
        End::Kill(When::Operations(u32::MAX)),
    );
    let little = vec![
        doom(20),
        write(rng.chance(500)),
        PlanOp::Syncfs,
        write(true),
    ];
    let second = life(
        vec![window(vec![little], false, false)],
        Vec::new(),
        End::PowerLoss(When::Operations(u32::MAX), Loss::AllUnflushed),
    );
    vec![first, second]
}

/// Few objects that many read, again and again, while each is removed, committed
/// and merged: a reader that is held up meanwhile has seen what is nowhere any more.
fn outrun(rng: &Stream) -> Vec<LifePlan> {
    let count = rng.pick(&[4u8, 8]);
    let attribute = |_| PlanOp::Setxattr {
        obj: any(rng),
        name: rng.below(3) as u8,
        len: 100,
        how: 0,
    };
    let name = || BURST_NAMES + rng.below(u64::from(count)) as u8;
    let read = |_| {
        // The root's attributes are beside its entries, and nobody who removes one
        // waits for who reads them.
        let obj = rng.pick(&[0, any(rng)]);
        let xattr = |_| PlanOp::Getxattr {
            obj,
            name: rng.below(3) as u8,
        };
        let first = match rng.below(3) {
            0 => xattr(0),
            _ => PlanOp::Getattr { obj },
        };
        // What has been read in is looked at before it leaves the cache.
        let look = match obj {
            0 => PlanOp::Readdir {
                dir: 0,
                plus: false,
            },
            _ => PlanOp::Listxattr { obj },
        };
        let lookup = PlanOp::Lookup {
            dir: 0,
            name: name(),
        };
        let wait = pause(rng.pick(&[1_000, 50_000, 300_000]));
        [first, look, xattr(0), lookup, wait]
    };
    let remove = |_| {
        let mut ops = vec![match rng.below(3) {
            0 => PlanOp::Removexattr {
                obj: any(rng),
                name: rng.below(3) as u8,
            },
            _ => PlanOp::Unlink {
                dir: 0,
                name: name(),
            },
        }];
        // A commit, one that lets its tree be merged, and time for the merge.
        let sync = PlanOp::Syncfs;
        ops.extend([
            sync.clone(),
            attribute(0),
            sync,
            pause(rng.pick(&[1_000_000, 5_000_000])),
        ]);
        ops
    };
    let mut windows = Vec::new();
    for _ in 0..3 {
        let made = (0..count).map(create).chain((0..count).map(attribute));
        windows.push(window(vec![made.collect()], true, false));
        let mut tasks: Vec<Vec<PlanOp>> = (0..4).map(|_| (0..8).flat_map(read).collect()).collect();
        tasks.push((0..4).flat_map(remove).collect());
        windows.push(window(tasks, false, true));
    }
    vec![life(windows, Vec::new(), End::Unmount)]
}

/// Readers of everything while merges replace what they read.
fn reuse(rng: &Stream) -> Vec<LifePlan> {
    let count = rng.pick(&[8u8, 16]);
    let big = |_| PlanOp::Setxattr {
        obj: any(rng),
        name: rng.below(8) as u8,
        len: 65_535,
        how: 0,
    };
    // Space runs out: what is free from now on is small, and soon used again.
    let made = (0..count).map(create).chain((0..70).map(big)).collect();
    let mut windows = vec![window(vec![made], true, false)];
    let read = |_| {
        let obj = any(rng);
        let name = rng.below(8) as u8;
        match rng.below(4) {
            0 => PlanOp::Lookup {
                dir: 0,
                name: BURST_NAMES + rng.below(u64::from(count)) as u8,
            },
            1 => PlanOp::Getattr { obj },
            2 => PlanOp::Listxattr { obj },
            _ => PlanOp::Getxattr { obj, name },
        }
    };
    let write = |_| {
        let obj = any(rng);
        let xattr = rng.below(8) as u8;
        let name = BURST_NAMES + rng.below(u64::from(count)) as u8;
        match rng.below(10) {
            0 | 1 => PlanOp::Removexattr { obj, name: xattr },
            2 => PlanOp::Unlink { dir: 0, name },
            3 => PlanOp::Create {
                dir: 0,
                name,
                excl: false,
                hold: false,
            },
            4..=6 => PlanOp::Syncfs,
            _ => PlanOp::Setxattr {
                obj,
                name: xattr,
                len: rng.pick(&[100, 896, 9000]),
                how: 0,
            },
        }
    };
    for _ in 0..3 {
        let mut tasks: Vec<Vec<PlanOp>> = (0..2).map(|_| (0..20).map(read).collect()).collect();
        tasks.push((0..60).map(write).collect());
        windows.push(window(tasks, rng.chance(500), rng.chance(300)));
    }
    vec![life(windows, Vec::new(), End::Unmount)]
}

/// Makes many items, lets them be merged, deletes most of them: trees grow
/// leaves and lose them, and blocks are used again.
fn churn(rng: &Stream) -> Vec<Window> {
    let count = rng.pick(&[20u8, 50, 100]);
    let mut made = Vec::new();
    for n in 0..count {
        let (dir, name) = (0, BURST_NAMES + n);
        made.push(PlanOp::Create {
            dir,
            name,
            excl: false,
            hold: false,
        });
        if rng.chance(700) {
            made.push(PlanOp::Setxattr {
                obj: any(rng),
                name: rng.below(8) as u8,
                len: rng.pick(&[100, 870, 896, 3000]),
                how: 0,
            });
        }
    }
    let mut gone: Vec<PlanOp> = Vec::new();
    for n in 0..count {
        let (dir, name) = (0, BURST_NAMES + n);
        let op = if rng.chance(900) {
            PlanOp::Unlink { dir, name }
        } else {
            PlanOp::Removexattr {
                obj: any(rng),
                name: rng.below(8) as u8,
            }
        };
        gone.insert(rng.below(gone.len() as u64 + 1) as usize, op);
    }
    let pause = || vec![PlanOp::Pause { micros: 6_000_000 }, PlanOp::Syncfs];
    let window = |tasks, sync| window(tasks, sync, rng.chance(200));
    vec![
        window(deal(made, rng.pick(&[1, 2])), true),
        window(vec![pause()], true),
        window(deal(gone, rng.pick(&[1, 3])), rng.chance(500)),
        window(vec![pause()], rng.chance(500)),
    ]
}

/// A few objects that are changed, synced and read by several tasks at once.
fn hot_objects(rng: &Stream) -> Vec<Window> {
    let tasks = rng.pick(&[3u64, 5, 8]);
    let objects: Vec<u16> = (0..3).map(|_| any(rng)).collect();
    let op = |writer: bool| {
        let obj = rng.pick(&objects);
        let (dir, name) = (0, rng.below(4) as u8);
        let xattr = rng.below(3) as u8;
        if !writer {
            return match rng.below(4) {
                0 => PlanOp::Lookup { dir, name },
                1 => PlanOp::Getattr { obj },
                2 => PlanOp::Listxattr { obj },
                _ => PlanOp::Getxattr { obj, name: xattr },
            };
        }
        match rng.below(8) {
            0..=2 => PlanOp::Setxattr {
                obj,
                name: xattr,
                len: rng.pick(&[5, 100]),
                how: 0,
            },
            3 => PlanOp::Removexattr { obj, name: xattr },
            4 => PlanOp::Chmod {
                obj,
                mode: rng.below(0o1000) as u16,
            },
            5 => PlanOp::Create {
                dir,
                name,
                excl: false,
                hold: false,
            },
            _ => PlanOp::Syncfs,
        }
    };
    let window = |_| Window {
        tasks: (0..tasks)
            .map(|task| (0..10).map(|_| op(task % 2 == 0)).collect())
            .collect(),
        sync: rng.chance(300),
        audit: rng.chance(300),
    };
    (0..3).map(window).collect()
}

/// Files of many extents that are cut while others sync, and a crash in between.
fn torn_truncates(rng: &Stream) -> Vec<Window> {
    let files: Vec<u16> = (0..5).map(|_| any(rng)).collect();
    let mut wrote = vec![PlanOp::Create {
        dir: 0,
        name: 0,
        excl: false,
        hold: false,
    }];
    for block in 0..16u64 {
        wrote.extend(files.iter().map(|file| PlanOp::Write {
            file: *file,
            offset: block * 8192,
            len: 4096,
            sync: false,
        }));
    }
    let cut = |file: &u16| {
        vec![PlanOp::Truncate {
            file: *file,
            size: rng.below(3) * 3000,
        }]
    };
    let mut tasks: Vec<Vec<PlanOp>> = files.iter().map(cut).collect();
    for _ in 0..3 {
        let sync = |_| [pause(rng.pick(&[1, 200, 1_000, 20_000])), PlanOp::Syncfs];
        tasks.push((0..8).flat_map(sync).collect());
    }
    tasks[0].insert(
        0,
        PlanOp::Doom {
            requests: 1 + rng.below(80) as u16,
        },
    );
    vec![
        window(vec![wrote], true, false),
        window(tasks, false, false),
    ]
}

/// Makes every file longer: what lies behind the old ends must be zeros.
fn grow_everything(rng: &Stream) -> Window {
    let grow = |file| PlanOp::Truncate {
        file,
        size: 200_000 + rng.below(5000),
    };
    Window {
        tasks: vec![(0..24).map(grow).collect()],
        sync: false,
        audit: true,
    }
}
