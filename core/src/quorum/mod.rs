//! Quorum: who runs the server (spec 09 sections 2 to 5).
//!
//! * [`config`]: the slots, checked; how many votes win.
//! * [`block`]: the slots' persistent blocks: one writer each, read by all.
//! * [`leaders`]: which earlier leaders a new one must fence, and where clients
//!   find the server.
//! * [`brain`]: the election, as a state machine.
//! * [`agent`]: the actor that carries its messages and writes its events.
//!
//! What can go wrong: two leaders at once. Elections only make that unlikely;
//! what prevents two *writers* is the fencing of earlier leaders, and that rests on
//! the blocks: an event is durable before anything acts on it.

pub mod agent;
pub mod block;
pub mod brain;
pub mod config;
pub mod leaders;

pub use agent::{
    AgentConfig, AgentError, AgentHandle, AgentPhase, AgentStatus, AgentStop, MakeStarter,
    ServerInstance, ServerStarter,
};
pub use block::{BlockIo, QuorumBlockError};
pub use brain::{Brain, Policy, Role, ServerPhase, Status};
pub use config::{ConfigError, Slots};
pub use leaders::{
    LeaderCandidate, fence_candidates, find_server, find_servers, gives_way, has_slot, steps_down,
    stop_would_hide, superseded, unresolved,
};

#[cfg(test)]
mod tests;

#[cfg(test)]
mod trust_tests;
