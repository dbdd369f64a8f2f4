//! Probes ("this was reached") and mutants (planted bugs).
//!
//! A probe costs one thread-local load when nobody listens. Mutants exist only
//! with the `mutants` feature, which the simulator alone turns on: without it
//! [`mutant`] is a constant `false` and the planted code is compiled out.

use std::cell::RefCell;

/// Receives the names of probes reached on this thread.
pub type ProbeSink = Box<dyn Fn(&'static str)>;

thread_local! {
    static SINK: RefCell<Option<ProbeSink>> = const { RefCell::new(None) };
}

/// Installs (or removes) this thread's probe sink; returns the old one.
pub fn set_probe_sink(sink: Option<ProbeSink>) -> Option<ProbeSink> {
    SINK.with(|cell| cell.replace(sink))
}

/// Marks that a rare place was reached.
pub fn probe(name: &'static str) {
    SINK.with(|cell| {
        if let Some(sink) = &*cell.borrow() {
            sink(name);
        }
    });
}

#[cfg(feature = "mutants")]
thread_local! {
    static MUTANT: std::cell::Cell<Option<&'static str>> = const { std::cell::Cell::new(None) };
}

/// Switches one planted bug on for this thread; `None` switches it off.
#[cfg(feature = "mutants")]
pub fn set_mutant(name: Option<&'static str>) {
    MUTANT.with(|cell| cell.set(name));
}

/// Switches one planted bug on; without the `mutants` feature there is none to switch.
#[cfg(not(feature = "mutants"))]
pub fn set_mutant(_name: Option<&'static str>) {}

/// Whether the planted bug `name` is on.
#[cfg(feature = "mutants")]
pub fn mutant(name: &str) -> bool {
    MUTANT.with(|cell| cell.get() == Some(name))
}

/// Whether the planted bug `name` is on: never, in this build.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn mutant(_name: &str) -> bool {
    false
}
