//! The simulator: worlds built from a seed, faults, workloads and oracles.
//!
//! The same core that production runs is driven here by a seeded executor with
//! virtual time (madsim), over disks and a network of our own, behind the seams
//! of `outrider_core::env` (docs/design.md section 6).
//!
//! What can go wrong: anything that makes a seed run differently in another
//! process. The rules are in docs/design.md section 7; `sweep --hashes` in two
//! processes is the proof.
//!
//! The executor exists only under `--cfg madsim`, which `.cargo/config.toml`
//! sets for builds inside the workspace; the parts without it (plans, models,
//! oracles) build everywhere.

#![recursion_limit = "256"] // futures of whole lives nest deeply

pub mod ask;
pub mod disk_model;
pub mod explain;
pub mod explore;
pub mod histories;
pub mod model;
pub mod oracle;
pub mod plan;
pub mod rng;
pub mod show;
pub mod shrink;
pub mod stress;
pub mod trace;

#[cfg(madsim)]
pub mod backend;
#[cfg(madsim)]
pub mod case;
#[cfg(madsim)]
pub mod cost;
#[cfg(madsim)]
pub mod differential;
#[cfg(madsim)]
pub mod kernel;
#[cfg(madsim)]
pub mod reference;
#[cfg(madsim)]
pub mod world;
