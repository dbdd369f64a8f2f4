//! The configurations that are explored, by name.

use super::election::{self, Election};
use super::locks::{self, Cluster};
use super::{Report, search};
use outrider_core::locks::Mode::{self, Read, Write, WriteOnly};

/// A configuration.
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
    /// Small enough for every test run.
    pub small: bool,
    kind: Kind,
}

enum Kind {
    Election(election::Bounds),
    Locks {
        tasks: &'static [&'static [(usize, Mode)]],
        failovers: u8,
        deaths: u8,
        releases: u8,
    },
}

impl Scenario {
    /// Explores it, at most `limit` states.
    pub fn run(&self, limit: u64) -> Report {
        match &self.kind {
            Kind::Election(bounds) => search(&Election::new(*bounds), limit),
            Kind::Locks {
                tasks,
                failovers,
                deaths,
                releases,
            } => {
                let bounds = locks::Bounds {
                    tasks: tasks.iter().map(|tasks| tasks.to_vec()).collect(),
                    failovers: *failovers,
                    deaths: *deaths,
                    releases: *releases,
                    batch: 1,
                };
                search(&Cluster::new(bounds), limit)
            }
        }
    }
}

const fn quorum(members: usize, terms: u64, crashes: u8, departures: u8, failures: u8) -> Kind {
    Kind::Election(election::Bounds {
        members,
        terms,
        crashes,
        departures,
        failures,
    })
}

/// Planted bugs that an exploration sees, and the configuration that shows each.
pub const MUTANTS: [(&str, &str); 7] = [
    ("stop_hides_predecessor", "lone-member"),
    ("stale_leader_starts", "two-members"),
    ("fence_recorded_late", "lone-member"),
    ("early_grant_applied", "readers-and-writer"),
    ("recovery_tells_new_mode", "readers-and-writer"),
    ("revoked_asks_for_nobody", "readers-and-writer"),
    ("votes_twice", "three-members"),
];

/// All configurations.
pub const SCENARIOS: [Scenario; 8] = [
    Scenario {
        name: "lone-member",
        about: "one member, four lives, a clean departure, a failed start",
        small: true,
        kind: quorum(1, 3, 3, 1, 1),
    },
    Scenario {
        name: "two-members",
        about: "two members of one vote each, a crash",
        small: true,
        kind: quorum(2, 2, 1, 0, 0),
    },
    Scenario {
        name: "two-members-long",
        about: "two members, three terms, two crashes, a departure, a failed start",
        small: false,
        kind: quorum(2, 3, 2, 1, 1),
    },
    Scenario {
        name: "three-members",
        about: "three members, two terms, a crash",
        small: false,
        kind: quorum(3, 2, 1, 0, 0),
    },
    Scenario {
        name: "readers-and-writer",
        about: "two clients, one lock: upgrade against writer, through a failover",
        small: true,
        kind: Kind::Locks {
            tasks: &[&[(0, Write), (0, Read)], &[(0, Write)]],
            failovers: 1,
            deaths: 0,
            releases: 0,
        },
    },
    Scenario {
        name: "death-and-release",
        about: "two clients, one lock: releases, a death and a failover",
        small: false,
        kind: Kind::Locks {
            tasks: &[&[(0, Write), (0, Read)], &[(0, Read)]],
            failovers: 1,
            deaths: 1,
            releases: 1,
        },
    },
    Scenario {
        name: "blind-writers",
        about: "two clients, one lock: write-only against readers, through two failovers",
        small: false,
        kind: Kind::Locks {
            tasks: &[&[(0, WriteOnly), (0, Read)], &[(0, WriteOnly)]],
            failovers: 2,
            deaths: 0,
            releases: 0,
        },
    },
    Scenario {
        name: "two-locks",
        about: "two clients, two locks, a failover and a death",
        small: false,
        kind: Kind::Locks {
            tasks: &[&[(0, Write), (1, Read)], &[(0, Read), (1, Write)]],
            failovers: 1,
            deaths: 1,
            releases: 0,
        },
    },
];
