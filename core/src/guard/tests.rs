use super::*;
use crate::env::testing::TestWorld;

const LIMIT: Duration = Duration::from_secs(2);

/// A guard whose answer can be changed, and how often it was asked.
struct Guard {
    world: TestWorld,
    guard: Rc<WriteGuard>,
    says: Rc<RefCell<Result<Standing, String>>>,
    looks: Rc<Cell<u32>>,
}

impl Guard {
    fn new() -> Self {
        let world = TestWorld::new(1, 16 << 20, 16 << 20);
        let guard = WriteGuard::new(&world.env(), LIMIT);
        let says = Rc::new(RefCell::new(Ok(Standing::Good)));
        let looks = Rc::new(Cell::new(0));
        let (answer, count) = (says.clone(), looks.clone());
        guard.set_look(Rc::new(move || {
            count.set(count.get() + 1);
            let answer = answer.borrow().clone();
            Box::pin(async move { answer })
        }));
        Self {
            world,
            guard,
            says,
            looks,
        }
    }

    fn say(&self, answer: Result<Standing, String>) {
        *self.says.borrow_mut() = answer;
    }

    fn device(&self) -> Rc<dyn BlockDevice> {
        self.guard.env().devices.open(DeviceRole::Meta).unwrap()
    }
}

async fn write(device: &Rc<dyn BlockDevice>, byte: u8) -> Result<(), DeviceError> {
    let mut buf = AlignedBuf::zeroed(4096);
    buf.fill(byte);
    device
        .write(8192, vec![buf.into()], WriteFlags::default())
        .await
}

async fn first_byte(device: &Rc<dyn BlockDevice>) -> u8 {
    let (buf, result) = device.read(8192, AlignedBuf::zeroed(4096)).await;
    result.unwrap();
    buf[0]
}

#[test]
fn a_look_is_good_for_its_time_and_no_longer() {
    let g = Guard::new();
    let (world, device) = (&g.world, g.device());
    world.block_on(async {
        for _ in 0..10 {
            write(&device, 1).await.unwrap();
        }
        assert_eq!(g.looks.get(), 1);
        world.env().sleep(LIMIT * 2).await;
        write(&device, 2).await.unwrap();
        assert_eq!(g.looks.get(), 2);
    });
}

#[test]
fn after_a_pause_a_mount_that_was_declared_dead_writes_nothing() {
    let g = Guard::new();
    let (world, device) = (&g.world, g.device());
    world.block_on(async {
        write(&device, 1).await.unwrap();
        world.env().sleep(LIMIT * 2).await;
        g.say(Ok(Standing::Lost));
        assert_eq!(write(&device, 2).await, Err(DeviceError::Shut));
        assert_eq!(write(&device, 2).await, Err(DeviceError::Shut));
        assert_eq!(first_byte(&device).await, 1, "reads go on");
        g.guard.lost().await;
        g.guard.idle().await;
        assert_eq!(g.looks.get(), 2, "lost is lost");
    });
}

#[test]
fn in_doubt_writes_wait_and_go_on_or_fail_with_the_answer() {
    for (answer, result) in [
        (Standing::Good, Ok(())),
        (Standing::Lost, Err(DeviceError::Shut)),
    ] {
        let g = Guard::new();
        let (world, device) = (&g.world, g.device());
        world.block_on(async {
            g.say(Ok(Standing::Doubtful));
            let done = Rc::new(RefCell::new(None));
            let (set, dev) = (done.clone(), device.clone());
            world.env().spawn("writer", async move {
                let result = write(&dev, 3).await;
                *set.borrow_mut() = Some(result);
            });
            world.env().sleep(LIMIT * 10).await;
            assert_eq!(*done.borrow(), None);
            assert_eq!(first_byte(&device).await, 0);
            g.say(Ok(answer));
            world.env().sleep(LIMIT).await;
            assert_eq!(*done.borrow(), Some(result));
        });
    }
}

#[test]
fn a_volume_that_cannot_be_read_fails_the_write_and_is_asked_again() {
    let g = Guard::new();
    let (world, device) = (&g.world, g.device());
    world.block_on(async {
        g.say(Err("the super block is unreadable".into()));
        let error = write(&device, 1).await.unwrap_err();
        assert!(error.to_string().contains("the super block is unreadable"));
        g.say(Ok(Standing::Good));
        write(&device, 2).await.unwrap();
        assert_eq!(first_byte(&device).await, 2);
    });
}

#[test]
fn a_shut_guard_ends_what_waits_and_idle_waits_for_what_flies() {
    let g = Guard::new();
    let (world, device) = (&g.world, g.device());
    world.block_on(async {
        g.say(Ok(Standing::Doubtful));
        let waiting = write(&device, 1);
        let shut = async {
            world.env().sleep(LIMIT).await;
            g.guard.shut();
            std::future::pending::<()>().await;
        };
        let ended = crate::env::race(waiting, shut).await;
        assert!(matches!(
            ended,
            crate::env::Either::Left(Err(DeviceError::Shut))
        ));
        let flying = InFlight::new(&g.guard);
        let guard = g.guard.clone();
        let idle = Rc::new(Cell::new(false));
        let set = idle.clone();
        world.env().spawn("idle", async move {
            guard.idle().await;
            set.set(true);
        });
        world.env().sleep(LIMIT).await;
        assert!(!idle.get());
        drop(flying);
        world.env().sleep(LIMIT).await;
        assert!(idle.get());
    });
}
