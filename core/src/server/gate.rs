//! Who may change the server's metadata now, and when that is written: the brain
//! of hold and apply (spec 04 section 8, 03 section 13).
//!
//! A handler *holds* the open commit, changes dirty state, and *applies*: waits
//! until a commit with its changes is durable. The last holder out starts that
//! commit. A handler that failed just leaves; what it changed goes out with the
//! next commit.
//!
//! What can go wrong: more holders than the allocator's two lists can feed, and
//! the opposite, no holder ever let in because the lists are worn out and nothing
//! triggers the commit that renews them. So each holder reserves a budget against
//! the room there was when the first one came, counting those who left as well,
//! and a refusal with nobody inside asks for a commit.

/// Room in the running allocator: blocks to take, and entries for freed blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Blocks available.
    pub avail: u32,
    /// Freed blocks that can still be noted.
    pub freed: u32,
}

/// Answer to a wish to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Held.
    Held,
    /// Wait for the commit that runs or will start, and ask again.
    Wait,
    /// Nobody holds and there is no room: the caller is to run a commit (it is
    /// marked as running) and ask again.
    CommitFirst,
}

/// The gate of one server instance.
#[derive(Clone, Debug)]
pub struct Gate {
    budget: u32,
    holders: u32,
    entered: u32,
    applying: u32,
    committing: bool,
    room: Room,
}

impl Gate {
    /// An open gate. Each holder may use `budget` blocks of either kind.
    pub fn new(budget: u32) -> Self {
        assert!(budget > 0, "a holder without a budget");
        Self {
            budget,
            holders: 0,
            entered: 0,
            applying: 0,
            committing: false,
            room: Room { avail: 0, freed: 0 },
        }
    }

    /// Asks to hold. `room` is the allocator's at this moment.
    pub fn hold(&mut self, room: Room) -> Entry {
        if self.committing || self.applying > 0 {
            return Entry::Wait;
        }
        if self.holders == 0 {
            self.entered = 0;
            self.room = room;
        }
        // One more for this holder and one for the commit's own work.
        let need = self.entered.saturating_add(2).saturating_mul(self.budget);
        if self.room.avail < need || self.room.freed < need {
            if self.holders > 0 {
                return Entry::Wait;
            }
            self.committing = true;
            return Entry::CommitFirst;
        }
        self.holders += 1;
        self.entered += 1;
        Entry::Held
    }

    /// Asks to hold alone, with `need` entries for the holder's own use.
    pub fn hold_alone(&mut self, room: Room, need: u32) -> Entry {
        if self.committing || self.applying > 0 || self.holders > 0 {
            return Entry::Wait;
        }
        let need = need.max(self.budget).saturating_add(self.budget);
        if room.avail < need || room.freed < need {
            self.committing = true;
            return Entry::CommitFirst;
        }
        self.room = room;
        self.holders = 1;
        // No room for anybody else.
        self.entered = u32::MAX;
        Entry::Held
    }

    /// A holder leaves, waiting for the commit if `apply`. True if the caller is
    /// to start the commit (it is marked as running).
    #[must_use]
    pub fn leave(&mut self, apply: bool) -> bool {
        assert!(self.holders > 0, "leaving a commit that nobody holds");
        assert!(!self.committing, "a commit ran under a holder");
        self.holders -= 1;
        if apply {
            self.applying += 1;
        }
        let start = self.holders == 0 && self.applying > 0;
        self.committing = start;
        start
    }

    /// The commit ended, well or not.
    pub fn committed(&mut self) {
        assert!(
            self.committing && self.holders == 0,
            "a commit ended that did not run"
        );
        self.committing = false;
        self.applying = 0;
        self.entered = 0;
    }

    /// Whether a commit runs.
    pub fn is_committing(&self) -> bool {
        self.committing
    }

    /// Holders inside.
    pub fn holders(&self) -> u32 {
        self.holders
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FULL: Room = Room {
        avail: 8185,
        freed: 8185,
    };

    #[test]
    fn a_full_list_admits_fifteen_at_a_budget_of_500() {
        let mut gate = Gate::new(500);
        for _ in 0..15 {
            assert_eq!(gate.hold(FULL), Entry::Held);
        }
        assert_eq!(gate.hold(FULL), Entry::Wait);
    }

    #[test]
    fn those_who_left_with_an_error_keep_their_budget() {
        let mut gate = Gate::new(500);
        let room = Room {
            avail: 2000,
            freed: 8185,
        };
        assert_eq!(gate.hold(room), Entry::Held);
        assert_eq!(gate.hold(room), Entry::Held);
        assert!(!gate.leave(false));
        assert_eq!(gate.hold(room), Entry::Held);
        assert!(!gate.leave(false));
        assert_eq!(gate.hold(room), Entry::Wait, "three have used up to 1500");
    }

    #[test]
    fn nobody_enters_behind_an_applier() {
        let mut gate = Gate::new(500);
        assert_eq!(gate.hold(FULL), Entry::Held);
        assert_eq!(gate.hold(FULL), Entry::Held);
        assert!(!gate.leave(true));
        assert_eq!(gate.hold(FULL), Entry::Wait);
        assert!(
            gate.leave(false),
            "the last one out commits for the applier"
        );
        assert_eq!(gate.hold(FULL), Entry::Wait);
        gate.committed();
        assert_eq!(gate.hold(FULL), Entry::Held);
    }

    #[test]
    fn worn_out_lists_are_renewed_by_a_commit() {
        let mut gate = Gate::new(500);
        let worn = Room {
            avail: 8185,
            freed: 999,
        };
        assert_eq!(gate.hold(worn), Entry::CommitFirst);
        assert!(gate.is_committing());
        gate.committed();
        assert_eq!(gate.hold(FULL), Entry::Held);
    }

    #[test]
    fn who_holds_alone_is_alone() {
        let mut gate = Gate::new(500);
        assert_eq!(gate.hold(FULL), Entry::Held);
        assert_eq!(gate.hold_alone(FULL, 3000), Entry::Wait);
        assert!(!gate.leave(false));
        assert_eq!(gate.hold_alone(FULL, 8000), Entry::CommitFirst);
        gate.committed();
        assert_eq!(gate.hold_alone(FULL, 3000), Entry::Held);
        assert_eq!(gate.hold(FULL), Entry::Wait);
        assert!(gate.leave(true));
        gate.committed();
        assert_eq!(gate.hold(FULL), Entry::Held);
    }

    proptest! {
        /// Whatever the holders do within their budgets, the lists never run out,
        /// and there is always a way on.
        #[test]
        fn budgets_never_exceed_the_room(
            budget in 1u32..50,
            steps in proptest::collection::vec((0u8..4, 0u32..1000), 1..200),
        ) {
            let full = budget * 8;
            let mut gate = Gate::new(budget);
            let mut left = full;
            let mut inside: Vec<u32> = Vec::new();
            for (what, amount) in steps {
                match what {
                    0 | 1 => match gate.hold(Room { avail: left, freed: full }) {
                        Entry::Held => inside.push(budget),
                        Entry::Wait => prop_assert!(gate.is_committing() || !inside.is_empty()),
                        Entry::CommitFirst => {
                            prop_assert!(inside.is_empty() && left >= budget);
                            gate.committed();
                            left = full;
                        }
                    },
                    2 => if let Some(mine) = inside.last_mut() {
                        let used = amount % (*mine + 1);
                        *mine -= used;
                        prop_assert!(left >= used + budget, "the commit's own share is gone");
                        left -= used;
                    },
                    _ => if inside.pop().is_some() && gate.leave(amount % 2 == 0) {
                        prop_assert!(inside.is_empty());
                        gate.committed();
                        left = full;
                    },
                }
                prop_assert_eq!(gate.holders() as usize, inside.len());
            }
        }
    }
}
