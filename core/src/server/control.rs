//! The handle through which the quorum agent starts, watches and stops a server
//! (spec 09 section 6): DOWN, STARTING, UP, STOPPING and DOWN again.
//!
//! What can go wrong: believing a server is down while it can still write. So
//! [`Status::Down`] is set by the server's main as its very last act, after all
//! of its I/O has finished, and a handle whose server vanished also reads as down
//! only because its thread, and with it every task, is gone.

use super::ServerConfig;
use crate::env::Env;
use crate::env::watch;
use crate::quorum::ServerPhase;
use crate::secure::secured;
use std::sync::Arc;

/// Where a server instance is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    /// Fencing earlier leaders. Writes nothing.
    Starting,
    /// All earlier leaders are fenced; waits for [`Control::may_serve`]. Writes nothing.
    Fenced,
    /// Reading the super, preparing recovery, accepting clients.
    Up,
    /// Asked to stop, or stopping by itself; may still write.
    Stopping,
    /// Gone: can not write any more.
    Down,
}

/// The agent's end. Clones watch and stop the same server. Crosses threads.
#[derive(Clone, Debug)]
pub struct Control {
    status: watch::Receiver<Status>,
    stop: Arc<watch::Sender<bool>>,
    serve: Arc<watch::Sender<bool>>,
}

/// The server's end.
#[derive(Debug)]
pub struct Handle {
    status: watch::Sender<Status>,
    stop: watch::Receiver<bool>,
    serve: watch::Receiver<bool>,
}

impl Control {
    /// Both ends for one server, which counts as starting from here.
    pub fn pair() -> (Control, Handle) {
        let (status_tx, status_rx) = watch::channel(Status::Starting);
        let (stop_tx, stop_rx) = watch::channel(false);
        let (serve_tx, serve_rx) = watch::channel(false);
        let control = Control {
            status: status_rx,
            stop: Arc::new(stop_tx),
            serve: Arc::new(serve_tx),
        };
        let handle = Handle {
            status: status_tx,
            stop: stop_rx,
            serve: serve_rx,
        };
        (control, handle)
    }

    /// Starts a server as an actor of its own.
    pub fn start(env: &Env, config: ServerConfig) -> Control {
        let (control, handle) = Self::pair();
        let main = move |env: Env| -> crate::env::LocalBoxFuture<'static, ()> {
            let env = secured(&env, config.cluster_key.as_ref());
            Box::pin(super::run(env, config, handle))
        };
        env.spawner.spawn_actor("server", Box::new(main));
        control
    }

    /// Where the server is now.
    pub fn status(&self) -> Status {
        if self.status.is_closed() {
            return Status::Down;
        }
        *self.status.borrow()
    }

    /// Tells a server that has fenced everybody before it that this is recorded,
    /// durably: now it may write.
    pub fn may_serve(&self) {
        self.serve.send_replace(true);
    }

    /// Asks the server to stop; does not wait.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Waits until the status differs from what this handle saw last. Cancel safe.
    /// Does not return any more once [`Status::Down`] was seen.
    pub async fn changed(&mut self) -> Status {
        if self.status.changed().await.is_err() {
            if *self.status.borrow_and_update() == Status::Down {
                return std::future::pending().await;
            }
            return Status::Down;
        }
        *self.status.borrow_and_update()
    }

    /// Waits until the server can not write any more.
    pub async fn down(&mut self) {
        // An error means the sender is gone, and with it the server.
        let _ = self.status.wait_for(|s| *s == Status::Down).await;
    }
}

/// The quorum agent's view of a server (spec 09 section 5).
impl crate::quorum::ServerInstance for Control {
    fn phase(&self) -> ServerPhase {
        match self.status() {
            Status::Starting => ServerPhase::Starting,
            Status::Fenced => ServerPhase::Fenced,
            Status::Up => ServerPhase::Up,
            Status::Stopping => ServerPhase::Stopping,
            Status::Down => ServerPhase::Down,
        }
    }
    fn may_serve(&self) {
        Control::may_serve(self);
    }
    fn stop(&self) {
        Control::stop(self);
    }
    fn changed(&mut self) -> crate::env::LocalBoxFuture<'_, ()> {
        Box::pin(async move {
            Control::changed(self).await;
        })
    }
}

impl Handle {
    /// Publishes a new status.
    pub fn set(&self, status: Status) {
        self.status.send_replace(status);
    }

    /// Waits for [`Control::may_serve`].
    pub async fn may_serve(&self) {
        let mut serve = self.serve.clone();
        if serve.wait_for(|may| *may).await.is_err() {
            std::future::pending().await
        }
    }

    /// Waits for [`Control::stop`]; also if every handle was dropped.
    pub async fn stop_asked(&self) {
        let mut stop = self.stop.clone();
        let _ = stop.wait_for(|asked| *asked).await;
    }

    /// Whether [`Control::stop`] was called.
    pub fn is_stop_asked(&self) -> bool {
        *self.stop.borrow()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vanished_server_reads_as_down() {
        let (control, handle) = Control::pair();
        assert_eq!(control.status(), Status::Starting);
        handle.set(Status::Up);
        assert_eq!(control.status(), Status::Up);
        assert!(!handle.is_stop_asked());
        control.stop();
        assert!(handle.is_stop_asked());
        drop(handle);
        assert_eq!(control.status(), Status::Down);
    }
}
