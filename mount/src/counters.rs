//! Counters of a mount: how often each probe of the code was reached on any of its
//! threads, under the names of the runtime directory.
//!
//! The names that tests of the original read are there from the start, at 0; all
//! others appear when they are first counted.
//!
//! What can go wrong: a counter that lags. Each thread counts for itself, and the sums
//! are made when somebody looks.

use outrider_core::env::set_probe_sink;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

/// Names of the original (spec 17 section 8) and what counts for them here.
const NAMED: [(&str, &str); 8] = [
    ("alloc_freed_fill", ""),
    ("block_cache_remove_stale", "stale_block"),
    ("log_merge_complete", "server.merge.end"),
    ("log_merge_no_finalized", "server.merge.no_finalized"),
    ("log_merge_start", "server.merge.start"),
    ("reclaimed_open_logs", "server.reclaim.log_tree"),
    ("server_commit", "server.commit"),
    ("srch_compact_error", ""),
];

type Counts = HashMap<&'static str, u64>;

/// The counters of one process. Clones are the same counters.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    threads: Arc<Mutex<Vec<Arc<Mutex<Counts>>>>>,
}

impl Counters {
    /// Counts on this thread from now on.
    pub fn count_here(&self) {
        let counts = Arc::new(Mutex::new(Counts::new()));
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.push(counts.clone());
        set_probe_sink(Some(Box::new(move |name| {
            // Nobody else holds it but for a moment, when it is looked at.
            let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
            *counts.entry(name).or_default() += 1;
        })));
    }

    /// All counters, by the name of their file.
    pub fn sums(&self) -> BTreeMap<String, u64> {
        let mut raw: BTreeMap<&'static str, u64> = BTreeMap::new();
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for counts in threads.iter() {
            let counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
            for (name, count) in counts.iter() {
                *raw.entry(name).or_default() += count;
            }
        }
        let named = NAMED
            .iter()
            .map(|(name, probe)| ((*name).to_owned(), raw.get(probe).copied().unwrap_or(0)));
        let all = raw
            .iter()
            .map(|(name, n)| (name.replace(['.', '/'], "_"), *n));
        all.chain(named).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrider_core::env::probe;

    #[test]
    fn counts_of_all_threads_are_summed_and_known_names_are_there() {
        let counters = Counters::default();
        assert_eq!(counters.sums()["log_merge_start"], 0);
        let others = counters.clone();
        let thread = std::thread::spawn(move || {
            others.count_here();
            probe("server.merge.start");
        });
        thread.join().unwrap();
        counters.count_here();
        probe("server.merge.start");
        probe("fs.other");
        let sums = counters.sums();
        assert_eq!((sums["log_merge_start"], sums["fs_other"]), (2, 1));
        set_probe_sink(None);
    }
}
