use super::*;
use outrider_core::env::{DeviceRole, Time, conformance, conformance_clock, conformance_net};
use std::net::SocketAddrV4;

/// Runs a world made of `f` on a fresh thread, as the executor demands.
pub fn simulate<F, T>(seed: u64, f: F) -> T
where
    F: AsyncFnOnce(Host) -> T + Send + 'static,
    T: Send + 'static,
{
    crate::world::on_fresh_thread(move || {
        let runtime =
            madsim::runtime::Runtime::with_seed_and_config(seed, madsim::Config::default());
        runtime.block_on(async move {
            let sim = Sim::new(seed, Trace::default());
            let node = Node::new(0, 0, 1_700_000_000_000_000_000);
            let host = Host {
                net: net::SimNet::new(&sim, net::Links::default()),
                disks: disk::Disks::new(&sim, 1 << 20, 1 << 20, disk::Timing::default()),
                life: Life::new(),
                sim,
                node,
            };
            f(host).await
        })
    })
    .expect("the world must not panic")
}

#[test]
fn simulated_devices_networks_and_clocks_keep_their_contracts() {
    for seed in 0..8 {
        simulate(seed, async |host: Host| {
            let disks = disk::Disks::new(&host.sim, 8 << 20, 8 << 20, disk::Timing::default());
            let host = Host { disks, ..host };
            let env = host.env("conformance");
            for role in [DeviceRole::Meta, DeviceRole::Data] {
                let device = host.disks.open(&host, role);
                conformance::check_device(device, &*env.entropy).await;
            }
            conformance::check_devices(&*env.devices).await;
            conformance_clock::check_clock(&env, true).await;
            let ip = host.node.ip;
            let addr = |number| SocketAddrV4::new(ip, 5000 + number);
            conformance_net::check_network(&env, addr).await;
        });
    }
}

#[test]
fn an_actor_begun_while_another_stands_still_runs_and_one_of_a_still_process_waits() {
    simulate(1, async |host: Host| {
        let begin = |of: &Rc<Life>| {
            let ran = Rc::new(Cell::new(false));
            let (actor, tell) = (of.child("quorum"), Rc::clone(&ran));
            spawn(&host.sim, &actor, Box::pin(async move { tell.set(true) }));
            (actor, ran)
        };
        let mount = host.life.child("mount");
        host.life.pause(Some("mount"), true);
        let (_actor, ran) = begin(&mount);
        host.sim.sleep(1000).await;
        assert!(mount.is_paused() && ran.get());
        host.life.pause(Some("mount"), false);
        host.life.pause(None, true);
        let (_actor, ran) = begin(&mount);
        host.sim.sleep(1000).await;
        assert!(!ran.get());
        host.life.pause(None, false);
        host.sim.sleep(1000).await;
        assert!(ran.get() && !mount.is_paused());
    });
}

#[test]
fn microseconds_exist_and_dropped_sleeps_leave_nothing() {
    simulate(1, async |host: Host| {
        let env = host.env("a");
        let start = env.clock.now();
        env.sleep(Duration::from_micros(5)).await;
        let took = env.clock.now().since(start);
        assert!((5..8).contains(&took.as_micros()), "{took:?}");
        for _ in 0..100 {
            let long = env.sleep(Duration::from_secs(100));
            let short = env.sleep(Duration::from_micros(1));
            assert_eq!(race(long, short).await, Either::Right(()));
        }
        assert_eq!(host.sim.timers.borrow().len(), 0);
        assert!(env.clock.now().since(start) < Duration::from_millis(1));
    });
}

#[test]
fn a_killed_life_never_runs_again() {
    simulate(2, async |host: Host| {
        let env = host.env("a");
        let count = Rc::new(Cell::new(0));
        let inner = Rc::clone(&count);
        let ticker = env.clone();
        let task = env.spawn("tick", async move {
            loop {
                ticker.sleep(Duration::from_micros(10)).await;
                inner.set(inner.get() + 1);
            }
        });
        host.sim.sleep(105_000).await;
        assert!((9..=10).contains(&count.get()), "{}", count.get());
        let before = count.get();
        host.life.kill();
        host.sim.sleep(1_000_000).await;
        assert_eq!(count.get(), before);
        assert!(task.is_finished());
        assert_eq!(host.life.tasks(), 0);
        assert_eq!(Rc::strong_count(&count), 1, "its futures are dropped");
    });
}

#[test]
fn an_actor_ends_with_its_tasks() {
    simulate(3, async |host: Host| {
        let env = host.env("a");
        let (tell, told) = tokio::sync::oneshot::channel::<u64>();
        env.spawner.spawn_actor(
            "b",
            Box::new(move |env| {
                Box::pin(async move {
                    let ticker = env.clone();
                    env.spawn("forever", async move {
                        loop {
                            ticker.sleep(Duration::from_micros(10)).await;
                        }
                    });
                    env.sleep(Duration::from_micros(50)).await;
                    let _ = tell.send(7);
                })
            }),
        );
        assert_eq!(told.await, Ok(7));
        host.sim.sleep(100_000).await;
        assert_eq!(host.life.tasks(), 0);
    });
}

#[test]
fn clocks_drift_and_wall_clocks_step() {
    simulate(4, async |mut host: Host| {
        host.node = Node::new(0, 100_000, 0);
        let env = host.env("a");
        env.sleep(Duration::from_millis(11)).await;
        let real = host.sim.now();
        assert!((9_999_000..10_010_000).contains(&real), "{real}");
        let before = env.clock.wall();
        host.node.step_wall(-5_000_000_000);
        assert!(env.clock.wall() < before);
        assert!(env.clock.now() >= Time(11_000_000));
    });
}
