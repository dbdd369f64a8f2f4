//! The server actor: the one place in the cluster that changes shared metadata
//! (spec 04 sections 8 to 12 and 16; 08 sections 8 to 10; 09 sections 6 to 11).
//!
//! * [`Control`]: the quorum agent's handle on one server instance, from
//!   election to shutdown; [`run`] is that instance's life.
//! * [`Store`]: the volume's metadata, stable and dirty, and the commits between;
//!   with [`gate`]: who may change state now, and when that is written. The
//!   commands that change it: log trees, log merge, reclaim, the super's fields.
//! * `hooks`: clients greet, ask and answer; locks and open inode maps.
//! * [`recovery`]: which clients of an earlier server are still to be heard from.
//! * [`fence`]: making sure that a mount that is gone can never write again.
//! * `farewell`: who may leave, and when.
//!
//! What can go wrong: two servers that write at once, a lock or a free block
//! given away while its old owner may still write, an answer sent before what it
//! promises is durable. Each has one place here that prevents it: the fence
//! before the first read of the super, the reclaim after the fence only, and
//! `apply`, through which every changing handler answers.

mod actor;
mod commands;
mod control;
mod error;
mod farewell;
pub mod fence;
pub mod gate;
mod hooks;
mod items;
mod lasting;
mod log_trees;
mod merge;
mod peers;
mod reclaim;
pub mod recovery;
mod report;
mod store;

pub use actor::{is_replaced, run};
pub use control::{Control, Handle, Status};
pub use error::ServerError;
pub use farewell::may_leave;
pub use fence::{FenceAgent, FenceError, FenceReason, FenceRequest};
pub use lasting::LastingAgent;
pub use log_trees::Progress;
pub use peers::Peers;
pub use report::{ClientReport, LockWait, MergeReport, ReportBoard, ServerReport};
pub use store::{Dirty, Hold, Store, SyncHook};

use crate::env::Duration;
use crate::secure::ClusterKey;
use std::net::SocketAddrV4;
use std::sync::Arc;

/// What one server instance is started with. Crosses to the server's thread.
#[derive(Clone)]
pub struct ServerConfig {
    /// Volume id.
    pub fsid: u64,
    /// The mount that runs this server.
    pub rid: u64,
    /// Term it was elected for; greater than 0.
    pub term: u64,
    /// Address of the mount's quorum slot, to listen on.
    pub addr: SocketAddrV4,
    /// Timeouts and limits.
    pub policy: Policy,
    /// Sizes and budgets of blocks and allocators.
    pub block_policy: crate::block::Policy,
    /// Who makes dead mounts really dead.
    pub fence: Arc<dyn FenceAgent>,
    /// Cluster key, for the actor's own network.
    pub cluster_key: Option<ClusterKey>,
    /// Where reports are asked for.
    pub reports: ReportBoard,
}

impl std::fmt::Debug for ServerConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerConfig")
            .field("rid", &format_args!("{:016x}", self.rid))
            .field("term", &self.term)
            .field("addr", &self.addr)
            .finish_non_exhaustive()
    }
}

/// What the spec leaves free or makes an option, with the original's values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// How long clients of an earlier server have to greet and tell their locks
    /// (spec 09 section 7).
    pub recovery_timeout: Duration,
    /// How long all earlier leaders together may take to be fenced (09 section 9.2).
    pub leader_fence_timeout: Duration,
    /// How long a new leader looks whether an earlier one, which did not record its
    /// stop, learns of the election by itself, before it has it fenced. On a busy machine
    /// a healthy one needs some tenths of a second; of one whose death the agent can
    /// prove nothing is waited for.
    pub leader_grace: Duration,
    /// How long such a one may take to record its stop.
    pub leader_stop_patience: Duration,
    /// How long an agent has for one mount (09 section 9.1).
    pub fence_timeout: Duration,
    /// How long a client may stay away before it is fenced (08 section 5).
    pub reconnect_timeout: Duration,
    /// Limit of silence on a client's connection (08 section 5).
    pub keepalive_timeout: Duration,
    /// How long GET_LOG_TREES waits for all mounts to finalize (05 section 3).
    pub log_merge_wait_timeout: Duration,
    /// First pause of that wait; half as long again each time.
    pub finalize_poll_min: Duration,
    /// Longest pause of that wait.
    pub finalize_poll_max: Duration,
    /// Item tree height above which a mount's GET_LOG_TREES finalizes it (05 section 3).
    pub finalize_height: u8,
    /// How long a look at the quorum blocks is good for: after it the server makes sure
    /// that it was not replaced before it writes. Below the heartbeat timeout.
    pub write_check: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            recovery_timeout: Duration::from_secs(30),
            leader_fence_timeout: Duration::from_secs(15),
            leader_grace: Duration::from_millis(500),
            leader_stop_patience: Duration::from_secs(3),
            fence_timeout: Duration::from_secs(30),
            reconnect_timeout: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(24),
            log_merge_wait_timeout: Duration::from_millis(500),
            finalize_poll_min: Duration::from_millis(5),
            finalize_poll_max: Duration::from_millis(100),
            finalize_height: 2,
            write_check: Duration::from_secs(5),
        }
    }
}

#[cfg(test)]
mod tests;
