//! The write guard: between a mount, or its server, and the devices. It lets writes
//! through only while the volume itself says that this mount still has a right to make
//! them, looked up again whenever the last look is too old.
//!
//! A mount that was stopped in its tracks (SIGSTOP, a paused virtual machine, a hung
//! host) does not know how long. When it goes on, others may have declared it dead and
//! given its blocks away. What they did is on the metadata device, and nothing they do
//! comes before it is durable there: a new leader's ELECT event comes before its server,
//! a reclaimed mount's item is deleted before its blocks are used. So the look is at the
//! device and not at messages, which may still be those of the time before.
//!
//! What can go wrong:
//! * A write that waits in a queue while its mount is paused. Looks are asked for when a
//!   write is handed to the device, not when it is wanted.
//! * A pause between the look and the hand-over, a few instructions. Only an agent outside
//!   or a watchdog is certain there; the guard makes it improbable, and fencing makes it
//!   harmless.
//! * A device that cannot be read: then nobody knows, and the write fails.

use crate::env::{
    AlignedBuf, BlockDevice, DeviceError, DeviceRole, Devices, Duration, Env, Gate, IoBuf,
    LocalBoxFuture, Signal, Time, WriteFlags, mutant, probe,
};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tokio::sync::Mutex;

/// Pause before a look is tried again, or a held write is looked at again.
const PAUSE: Duration = Duration::from_millis(100);
/// Looks in a row that may fail.
const TRIES: u32 = 10;

/// What the volume says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Writes are right.
    Good,
    /// Nobody said otherwise, but this mount was out of touch for too long: writes wait.
    Doubtful,
    /// It was declared dead or replaced: it never writes again.
    Lost,
}

/// Looks at the volume; an error is no answer.
pub type Look = Rc<dyn Fn() -> LocalBoxFuture<'static, Result<Standing, String>>>;

/// See the head of this file.
pub struct WriteGuard {
    env: Env,
    limit: Duration,
    /// When the last good look began.
    looked: Cell<Option<Time>>,
    look: RefCell<Option<Look>>,
    looking: Mutex<()>,
    shut: Gate,
    lost: Gate,
    in_flight: Cell<usize>,
    changed: Signal,
}

impl WriteGuard {
    /// A guard whose looks are good for `limit`. Until [`WriteGuard::set_look`] it lets
    /// everything through.
    pub fn new(env: &Env, limit: Duration) -> Rc<Self> {
        Rc::new(Self {
            env: env.clone(),
            limit,
            looked: Cell::default(),
            look: RefCell::default(),
            looking: Mutex::default(),
            shut: Gate::default(),
            lost: Gate::default(),
            in_flight: Cell::default(),
            changed: Signal::default(),
        })
    }

    /// How the volume is looked at.
    pub fn set_look(&self, look: Look) {
        *self.look.borrow_mut() = Some(look);
    }

    /// The environment with guarded devices.
    pub fn env(self: &Rc<Self>) -> Env {
        let devices = Guarded {
            guard: self.clone(),
            inner: self.env.devices.clone(),
        };
        Env {
            devices: Rc::new(devices),
            ..self.env.clone()
        }
    }

    /// Lets no write through any more. Those in flight go on: [`WriteGuard::idle`].
    pub fn shut(&self) {
        self.shut.open();
        // The look has parts of the mount, which has this.
        self.look.borrow_mut().take();
    }

    /// Whether no write is let through any more.
    pub fn is_shut(&self) -> bool {
        self.shut.is_open()
    }

    /// Completes when the volume said that this mount is lost.
    pub async fn lost(&self) {
        self.lost.wait().await;
    }

    /// Whether no write is in flight.
    pub fn is_idle(&self) -> bool {
        self.in_flight.get() == 0
    }

    /// Waits until no write is in flight.
    pub async fn idle(&self) {
        self.changed
            .wait_for(|| (self.in_flight.get() == 0).then_some(()))
            .await;
    }

    fn is_fresh(&self) -> bool {
        let now = self.env.clock.now();
        let fresh = |looked: Time| now.since(looked) <= self.limit;
        self.look.borrow().is_none() || self.looked.get().is_some_and(fresh)
    }

    /// Looks now, whatever was seen before.
    ///
    /// # Errors
    /// If the volume can not be looked at.
    pub async fn look_now(&self) -> Result<Standing, String> {
        let look = self.look.borrow().clone();
        let Some(look) = look.filter(|_| !self.is_shut()) else {
            return Ok(match self.is_shut() {
                true => Standing::Lost,
                false => Standing::Good,
            });
        };
        let began = self.env.clock.now();
        let seen = look().await?;
        match seen {
            Standing::Good => self.looked.set(self.looked.get().max(Some(began))),
            Standing::Lost => {
                self.shut();
                self.lost.open();
            }
            Standing::Doubtful => {}
        }
        Ok(seen)
    }

    /// Waits for the right to make one write.
    async fn enter(&self) -> Result<(), DeviceError> {
        let mut failed = 0;
        loop {
            if self.is_shut() {
                return Err(DeviceError::Shut);
            }
            // Mutant: trusts what was true before a pause.
            if self.is_fresh() || mutant("write_after_a_pause_unchecked") {
                return Ok(());
            }
            let _one = self.looking.lock().await;
            // Somebody else has looked meanwhile, or shut it.
            let look = self.look.borrow().clone();
            let (false, Some(look)) = (self.is_fresh(), look) else {
                continue;
            };
            let began = self.env.clock.now();
            match look().await {
                Ok(Standing::Good) => {
                    // Whether it is still fresh is asked again: the pause may be now.
                    self.looked.set(Some(began));
                    failed = 0;
                    continue;
                }
                Ok(Standing::Lost) => {
                    probe("guard.lost");
                    self.shut();
                    self.lost.open();
                    continue;
                }
                Ok(Standing::Doubtful) => probe("guard.doubtful"),
                Err(detail) => {
                    probe("guard.no_answer");
                    failed += 1;
                    if failed == TRIES {
                        return Err(DeviceError::Io {
                            op: "write",
                            offset: 0,
                            len: 0,
                            detail: format!("it is not known whether this mount may: {detail}"),
                        });
                    }
                }
            }
            let shut = self.shut.clone();
            crate::env::race(shut.wait(), self.env.sleep(PAUSE)).await;
        }
    }
}

impl std::fmt::Debug for WriteGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteGuard")
            .field("limit", &self.limit)
            .field("looked", &self.looked)
            .field("shut", &self.is_shut())
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

/// Counts a write while it is in flight.
struct InFlight(Rc<WriteGuard>);

impl InFlight {
    fn new(guard: &Rc<WriteGuard>) -> Self {
        guard.in_flight.set(guard.in_flight.get() + 1);
        Self(guard.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.set(self.0.in_flight.get() - 1);
        self.0.changed.wake_all();
    }
}

struct Guarded {
    guard: Rc<WriteGuard>,
    inner: Rc<dyn Devices>,
}

impl Devices for Guarded {
    fn open(&self, role: DeviceRole) -> Result<Rc<dyn BlockDevice>, DeviceError> {
        Ok(Rc::new(GuardedDevice {
            guard: self.guard.clone(),
            inner: self.inner.open(role)?,
        }))
    }
}

struct GuardedDevice {
    guard: Rc<WriteGuard>,
    inner: Rc<dyn BlockDevice>,
}

impl BlockDevice for GuardedDevice {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read(
        &self,
        offset: u64,
        buf: AlignedBuf,
    ) -> LocalBoxFuture<'static, (AlignedBuf, Result<(), DeviceError>)> {
        self.inner.read(offset, buf)
    }

    fn write(
        &self,
        offset: u64,
        bufs: Vec<IoBuf>,
        flags: WriteFlags,
    ) -> LocalBoxFuture<'static, Result<(), DeviceError>> {
        let (guard, inner) = (self.guard.clone(), self.inner.clone());
        Box::pin(async move {
            guard.enter().await?;
            let _in_flight = InFlight::new(&guard);
            inner.write(offset, bufs, flags).await
        })
    }

    fn flush(&self) -> LocalBoxFuture<'static, Result<(), DeviceError>> {
        // Writes nothing that was not let through.
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests;
