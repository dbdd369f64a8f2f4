//! The device and executor over real files, with both engines.

#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    clippy::disallowed_macros
)]

use outrider_core::env::{
    AlignedBuf, BlockDevice, Datagram, DeviceError, DeviceRole, Duration, Gate, Listener,
    LocalBoxFuture, NetError, Network, Stream, WriteFlags, conformance, conformance_clock, race,
    timeout,
};
use outrider_disk::{
    Engine, FileDevice, IoConfig, OpenOptions, Runtime, RuntimeConfig, VolumeFiles,
};
use std::cell::{Cell, RefCell};
use std::net::SocketAddrV4;
use std::rc::Rc;
use std::sync::Arc;

struct NoNetwork;

impl Network for NoNetwork {
    fn bind_datagram(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Rc<dyn Datagram>, NetError>> {
        Box::pin(async move { Err(NetError::AddrInUse(addr)) })
    }
    fn listen(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Box<dyn Listener>, NetError>> {
        Box::pin(async move { Err(NetError::AddrInUse(addr)) })
    }
    fn connect(
        &self,
        addr: SocketAddrV4,
        _keepalive: Duration,
    ) -> LocalBoxFuture<'static, Result<Stream, NetError>> {
        Box::pin(async move { Err(NetError::Refused(addr)) })
    }
}

fn runtime(engine: Engine, volume: Option<VolumeFiles>) -> Runtime {
    Runtime::new(RuntimeConfig {
        network: Arc::new(|| Rc::new(NoNetwork)),
        volume,
        io: IoConfig {
            engine,
            queue_depth: 16,
        },
    })
}

fn image(mib: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(mib << 20).unwrap();
    file
}

#[test]
fn files_keep_the_contract_with_each_engine() {
    for engine in [Engine::Auto, Engine::Threads] {
        let file = image(16);
        let path = file.path().to_owned();
        runtime(engine, None)
            .run(|env| async move {
                let device = FileDevice::open(&path, OpenOptions::default()).unwrap();
                conformance::check_device(Rc::new(device), &*env.entropy).await;
            })
            .unwrap();
    }
}

#[test]
fn volumes_clocks_and_actors_keep_their_contracts_with_each_engine() {
    for engine in [Engine::Auto, Engine::Threads] {
        let (meta, data) = (image(4), image(8));
        let rt = runtime(engine, Some(VolumeFiles::new(meta.path(), data.path())));
        rt.run(|env| async move {
            conformance::check_devices(&*env.devices).await;
            conformance_clock::check_clock(&env, true).await;
        })
        .unwrap();
        rt.join();
    }
}

#[test]
fn a_shut_volume_fails_every_request() {
    let file = image(4);
    let volume = VolumeFiles::new(file.path(), file.path());
    let shutter = volume.shutter.clone();
    runtime(Engine::Auto, Some(volume))
        .run(|env| async move {
            let device = env.devices.open(DeviceRole::Meta).unwrap();
            device.flush().await.unwrap();
            shutter.shut();
            assert_eq!(device.flush().await, Err(DeviceError::Shut));
            let (_, result) = device.read(0, AlignedBuf::zeroed(4096)).await;
            assert_eq!(result, Err(DeviceError::Shut));
            let buf = Arc::new(AlignedBuf::zeroed(4096));
            let result = device.write(0, vec![buf], WriteFlags::default()).await;
            assert_eq!(result, Err(DeviceError::Shut));
        })
        .unwrap();
}

#[test]
fn a_read_only_device_refuses_writes_and_a_missing_one_is_named() {
    let file = image(4);
    let path = file.path().to_owned();
    runtime(Engine::Auto, None)
        .run(|env| async move {
            let options = OpenOptions {
                read_only: true,
                ..OpenOptions::default()
            };
            let device = FileDevice::open(&path, options).unwrap();
            let buf = Arc::new(AlignedBuf::zeroed(4096));
            let result = device.write(0, vec![buf], WriteFlags::default()).await;
            assert!(matches!(result, Err(DeviceError::Io { op: "write", .. })));
            let gone = path.with_extension("gone");
            let text = FileDevice::open(&gone, options).unwrap_err().to_string();
            assert!(text.contains("gone"), "{text}");
            let text = env
                .devices
                .open(DeviceRole::Data)
                .err()
                .unwrap()
                .to_string();
            assert!(text.contains("Data"), "{text}");
        })
        .unwrap();
}

#[test]
fn timers_fire_in_order_and_dropped_ones_do_not() {
    for engine in [Engine::Auto, Engine::Threads] {
        runtime(engine, None)
            .run(|env| async move {
                let start = env.clock.now();
                let order = Rc::new(RefCell::new(Vec::new()));
                for ms in [30u64, 10, 20] {
                    let (env2, order) = (env.clone(), Rc::clone(&order));
                    env.spawn("sleeper", async move {
                        env2.sleep(Duration::from_millis(ms)).await;
                        order.borrow_mut().push(ms);
                    });
                }
                let deadline = env.clock.now() + Duration::from_millis(5);
                let never = std::future::pending::<()>();
                assert!(timeout(&*env.clock, deadline, never).await.is_none());
                race(
                    env.sleep(Duration::from_millis(50)),
                    env.sleep(Duration::from_secs(100)),
                )
                .await;
                assert_eq!(*order.borrow(), [10, 20, 30]);
                let took = env.clock.now().since(start);
                assert!(took >= Duration::from_millis(55), "{took:?}");
                assert!(took < Duration::from_secs(10), "{took:?}");
            })
            .unwrap();
    }
}

#[test]
fn tasks_are_aborted_at_their_waits() {
    struct OnDrop(Rc<Cell<u32>>);
    impl Drop for OnDrop {
        fn drop(&mut self) {
            self.0.set(self.0.get() + 1);
        }
    }
    runtime(Engine::Auto, None)
        .run(|env| async move {
            let drops = Rc::new(Cell::new(0));
            let guard = OnDrop(Rc::clone(&drops));
            let task = env.spawn("waiter", async move {
                let _guard = guard;
                std::future::pending::<()>().await;
            });
            env.sleep(Duration::from_millis(1)).await;
            assert!(!task.is_finished());
            task.abort();
            assert!(task.is_finished());
            assert_eq!(drops.get(), 1);
            task.abort();
            // A task that ended, and one aborted from inside.
            let done = env.spawn("done", async {});
            env.sleep(Duration::from_millis(1)).await;
            assert!(done.is_finished());
            let gate = Gate::default();
            let (inner, opened) = (gate.clone(), Rc::clone(&drops));
            let guard = OnDrop(opened);
            env.spawn("gate", async move {
                let _guard = guard;
                inner.wait().await;
            });
            gate.open();
            env.sleep(Duration::from_millis(1)).await;
            assert_eq!(drops.get(), 2);
        })
        .unwrap();
}

#[test]
fn a_task_polled_in_place_ends_at_once_or_is_parked() {
    runtime(Engine::Auto, None)
        .run(|env| async move {
            let hits = Rc::new(Cell::new(0));
            let h = Rc::clone(&hits);
            let ended =
                outrider_disk::spawn_polled(Box::pin(async move { h.set(h.get() + 1) }), |_| {
                    panic!("it did not wait")
                });
            assert!(ended);
            let (h, env2) = (Rc::clone(&hits), env.clone());
            let handle = Rc::new(RefCell::new(None));
            let slot = Rc::clone(&handle);
            let ended = outrider_disk::spawn_polled(
                Box::pin(async move {
                    env2.sleep(Duration::from_millis(5)).await;
                    h.set(h.get() + 1);
                }),
                |task| *slot.borrow_mut() = Some(task),
            );
            assert!(!ended && hits.get() == 1);
            env.sleep(Duration::from_millis(30)).await;
            assert_eq!(hits.get(), 2);
            assert!(handle.borrow().as_ref().unwrap().is_finished());
        })
        .unwrap();
}

#[test]
fn actors_wake_each_other_across_threads() {
    const ROUNDS: u32 = 2000;
    for engine in [Engine::Auto, Engine::Threads] {
        let rt = runtime(engine, None);
        rt.run(|env| async move {
            let (to, mut from_main) = tokio::sync::mpsc::unbounded_channel::<u32>();
            let (back, mut from_actor) = tokio::sync::mpsc::unbounded_channel::<u32>();
            env.spawner.spawn_actor(
                "echo",
                Box::new(move |env| {
                    Box::pin(async move {
                        while let Some(n) = from_main.recv().await {
                            if n % 100 == 0 {
                                env.sleep(Duration::from_micros(200)).await;
                            }
                            back.send(n + 1).unwrap();
                        }
                    })
                }),
            );
            for n in 0..ROUNDS {
                to.send(n).unwrap();
                assert_eq!(from_actor.recv().await, Some(n + 1));
            }
            drop(to);
            assert_eq!(from_actor.recv().await, None);
        })
        .unwrap();
        rt.join();
    }
}

#[test]
fn an_actor_may_end_with_requests_running() {
    let file = image(8);
    for _ in 0..20 {
        let path = file.path().to_owned();
        runtime(Engine::Auto, None)
            .run(|env| async move {
                let device = Rc::new(FileDevice::open(&path, OpenOptions::default()).unwrap());
                for nr in 0..100u64 {
                    let device = Rc::clone(&device);
                    env.spawn("io", async move {
                        let bufs = vec![Arc::new(AlignedBuf::zeroed(65536))];
                        let _ = device.write(nr * 65536, bufs, WriteFlags::default()).await;
                    });
                }
                device.flush().await.unwrap();
            })
            .unwrap();
    }
}
