//! What a sweep takes: processor time of each seed, memory of the process.

use outrider_sim::plan::Plan;
use outrider_sim::shrink::faults;
use outrider_sim::world::Outcome;
use serde_json::{Value, json};

/// What one seed took, and what it was.
#[derive(Clone, Debug)]
pub struct Spent {
    seed: u64,
    nodes: usize,
    operations: usize,
    faults: usize,
    cpu: f64,
    nanos: u64,
    calls: u64,
    events: u64,
    polls: u64,
    judge: u64,
}

impl Spent {
    /// Of a seed that has run.
    pub fn new(plan: &Plan, outcome: &Outcome, cpu_nanos: u64) -> Self {
        Self {
            seed: plan.seed,
            nodes: plan.cluster.as_ref().map_or(1, |c| c.nodes.len()),
            operations: plan.operations(),
            faults: faults(plan),
            cpu: cpu_nanos as f64 / 1e9,
            nanos: outcome.nanos,
            calls: outcome.calls,
            events: outcome.events,
            polls: outcome.polls,
            judge: outcome.steps,
        }
    }

    /// Processor seconds.
    pub fn cpu(&self) -> f64 {
        self.cpu
    }

    /// How many operations and faults its plan has.
    pub fn extent(&self) -> (usize, usize) {
        (self.operations, self.faults)
    }

    /// One line of `--each`.
    pub fn to_json(&self) -> Value {
        json!({
            "seed": self.seed, "nodes": self.nodes, "operations": self.operations,
            "faults": self.faults, "cpu_seconds": self.cpu,
            "simulated_seconds": self.nanos as f64 / 1e9, "calls": self.calls,
            "events": self.events, "polls": self.polls, "judge_steps": self.judge,
        })
    }
}

/// Median, 90th percentile and greatest of the processor seconds of all seeds.
pub fn quantiles(all: &[Spent]) -> [f64; 3] {
    let mut cpu: Vec<f64> = all.iter().map(Spent::cpu).collect();
    cpu.sort_by(f64::total_cmp);
    let at = |share: usize| {
        let last = cpu.len().saturating_sub(1);
        cpu.get(last * share / 100).copied().unwrap_or(0.0)
    };
    [at(50), at(90), at(100)]
}

/// Most memory that the process had at a time, in bytes.
pub fn peak_memory() -> u64 {
    // SAFETY: plain figures, written by the call.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    u64::try_from(usage.ru_maxrss).unwrap_or(0) * 1024
}

/// Memory that the process has now, in bytes; 0 where the system does not tell.
pub fn memory() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<u64>().ok());
    // SAFETY: asks for a number.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    pages.unwrap_or(0) * u64::try_from(page).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_seeds_and_memory_is_told() {
        let of = |cpu: u64| Spent::new(&Plan::from_seed(1, None), &Outcome::default(), cpu);
        let all: Vec<Spent> = (1..=11).map(|n| of(n * 1_000_000_000)).collect();
        assert_eq!(quantiles(&all), [6.0, 10.0, 11.0]);
        assert_eq!(quantiles(&[]), [0.0; 3]);
        assert!(memory() > 1 << 20 && peak_memory() >= 1 << 20);
    }
}
