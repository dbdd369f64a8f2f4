//! What every clock and every spawner must do, written against the seams alone and run
//! over each backend: the simulated, the real, and those of tests.
//!
//! Real clocks run on while a loaded machine does something else: nothing here says how
//! late a timer may be, but for one bound that only a broken one exceeds.

use super::{Clock, Duration, Env, Gate, Time, race, timeout};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Longest that anything here may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs every check of the clock, of tasks and, where the backend has them, of `actors`.
///
/// # Panics
/// If the backend does not keep its contract.
pub async fn check_clock(env: &Env, actors: bool) {
    time_never_goes_back(env).await;
    a_sleep_ends_no_sooner_than_it_should(env).await;
    timers_fire_in_order(env).await;
    a_dropped_sleep_is_forgotten(env).await;
    wall_time_goes_on_with_the_clock(env).await;
    a_task_runs_and_ends(env).await;
    an_aborted_task_is_dropped(env).await;
    a_gate_wakes_all_who_wait(env).await;
    if actors {
        an_actor_has_seams_of_its_own(env).await;
    }
}

async fn time_never_goes_back(env: &Env) {
    let mut last = env.clock.now();
    for round in 0..200 {
        let now = env.clock.now();
        assert!(now >= last, "{now:?} after {last:?}");
        last = now;
        if round % 20 == 0 {
            env.spawner.yield_point("conformance").await;
        }
    }
}

async fn a_sleep_ends_no_sooner_than_it_should(env: &Env) {
    for micros in [1, 50, 999, 1000, 5001] {
        let deadline = env.clock.now() + Duration::from_micros(micros);
        env.clock.sleep_until(deadline).await;
        let now = env.clock.now();
        assert!(now >= deadline, "woken at {now:?}, wanted {deadline:?}");
        assert!(now.since(deadline) < PATIENCE, "far too late: {now:?}");
    }
    // What is over needs no wait.
    let before = env.clock.now();
    env.clock.sleep_until(Time(0)).await;
    env.clock.sleep_until(before).await;
}

async fn timers_fire_in_order(env: &Env) {
    let order = Rc::new(RefCell::new(Vec::new()));
    let begun = env.clock.now();
    let tasks: Vec<_> = [40_u64, 10, 30, 20, 0]
        .into_iter()
        .map(|millis| {
            let (clock, order) = (Rc::clone(&env.clock), Rc::clone(&order));
            env.spawn("timer", async move {
                clock
                    .sleep_until(begun + Duration::from_millis(millis))
                    .await;
                order.borrow_mut().push(millis);
            })
        })
        .collect();
    until(env, || tasks.iter().all(|task| task.is_finished())).await;
    assert_eq!(*order.borrow(), [0, 10, 20, 30, 40]);
}

async fn a_dropped_sleep_is_forgotten(env: &Env) {
    for _ in 0..50 {
        let long = env.sleep(Duration::from_secs(1000));
        let short = env.sleep(Duration::from_micros(10));
        race(long, short).await;
    }
    let deadline = env.clock.now() + Duration::from_millis(1);
    let never = std::future::pending::<()>();
    let ended = timeout(&*env.clock, deadline, never).await;
    assert!(ended.is_none() && env.clock.now() >= deadline);
}

async fn wall_time_goes_on_with_the_clock(env: &Env) {
    let nanos = |clock: &dyn Clock| {
        let wall = clock.wall();
        assert!(wall.nsec < 1_000_000_000, "{wall:?}");
        i128::from(wall.sec) * 1_000_000_000 + i128::from(wall.nsec)
    };
    let (wall, begun) = (nanos(&*env.clock), env.clock.now());
    env.sleep(Duration::from_millis(30)).await;
    let (passed, took) = (nanos(&*env.clock) - wall, env.clock.now().since(begun));
    // A clock may drift, and a busy machine may stop between the two looks.
    let most = 2 * (took + Duration::from_secs(1)).as_nanos() as i128;
    assert!((0..most).contains(&passed), "{passed} ns in {took:?}");
}

async fn a_task_runs_and_ends(env: &Env) {
    let count = Rc::new(Cell::new(0));
    let tasks: Vec<_> = (0..10)
        .map(|_| {
            let (count, spawner) = (Rc::clone(&count), Rc::clone(&env.spawner));
            env.spawn("count", async move {
                spawner.yield_point("conformance").await;
                count.set(count.get() + 1);
            })
        })
        .collect();
    assert_eq!(count.get(), 0, "a task runs only when somebody waits");
    until(env, || tasks.iter().all(|task| task.is_finished())).await;
    assert_eq!(count.get(), 10);
    // Nobody has to hold on to a task.
    let inner = Rc::clone(&count);
    drop(env.spawn("count", async move { inner.set(77) }));
    until(env, || count.get() == 77).await;
}

async fn an_aborted_task_is_dropped(env: &Env) {
    struct OnDrop(Rc<Cell<u32>>);
    impl Drop for OnDrop {
        fn drop(&mut self) {
            self.0.set(self.0.get() + 1);
        }
    }
    let drops = Rc::new(Cell::new(0));
    let guard = OnDrop(Rc::clone(&drops));
    let task = env.spawn("waits", async move {
        let _guard = guard;
        std::future::pending::<()>().await;
    });
    env.sleep(Duration::from_millis(1)).await;
    assert!(!task.is_finished() && drops.get() == 0);
    task.abort();
    until(env, || drops.get() == 1).await;
    assert!(task.is_finished());
    task.abort();
    let ended = env.spawn("ends", async {});
    until(env, || ended.is_finished()).await;
    ended.abort();
}

async fn a_gate_wakes_all_who_wait(env: &Env) {
    let (gate, woken) = (Gate::default(), Rc::new(Cell::new(0)));
    for _ in 0..5 {
        let (gate, woken) = (gate.clone(), Rc::clone(&woken));
        env.spawn("waits", async move {
            gate.wait().await;
            woken.set(woken.get() + 1);
        });
    }
    env.sleep(Duration::from_millis(1)).await;
    assert_eq!(woken.get(), 0);
    gate.open();
    until(env, || woken.get() == 5).await;
}

async fn an_actor_has_seams_of_its_own(env: &Env) {
    let done = Arc::new(AtomicU64::new(0));
    let told = Arc::clone(&done);
    env.spawner.spawn_actor(
        "conformance",
        Box::new(move |env| {
            Box::pin(async move {
                let begun = env.clock.now();
                let inner = Rc::new(Cell::new(0));
                let count = Rc::clone(&inner);
                env.spawn("in it", async move { count.set(1) });
                env.sleep(Duration::from_millis(5)).await;
                assert!(env.clock.now().since(begun) >= Duration::from_millis(5));
                told.store(1 + inner.get(), Ordering::SeqCst);
            })
        }),
    );
    until(env, || done.load(Ordering::SeqCst) > 0).await;
    assert_eq!(done.load(Ordering::SeqCst), 2, "its own task has run");
}

/// Waits until something is so.
async fn until(env: &Env, so: impl Fn() -> bool) {
    let deadline = env.clock.now() + PATIENCE;
    while !so() {
        assert!(env.clock.now() < deadline, "took longer than {PATIENCE:?}");
        env.sleep(Duration::from_micros(200)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::TestWorld;
    use super::*;

    #[test]
    fn the_clock_of_tests_conforms() {
        let world = TestWorld::new(1, 1 << 20, 1 << 20);
        world.block_on(check_clock(&world.env(), false));
    }
}
