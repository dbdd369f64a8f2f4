//! Log lines about strangers, at a bounded rate.
//!
//! What can go wrong: a flood that fills the log, and so the disk, or that hides
//! what else is said there. One line each period, with a count of the rest.

use crate::env::{Duration, Time};

/// Lets one line pass each period and counts the others.
#[derive(Debug)]
pub struct Notice {
    period: Duration,
    next: Time,
    held: u64,
}

impl Notice {
    /// At most one line each `period`.
    pub const fn new(period: Duration) -> Self {
        Self {
            period,
            next: Time(0),
            held: 0,
        }
    }

    /// Something happened: `Some` if a line may be written now, with the number of
    /// those that were not written since the last line.
    pub fn admit(&mut self, now: Time) -> Option<u64> {
        if now < self.next {
            self.held += 1;
            return None;
        }
        self.next = now + self.period;
        Some(std::mem::take(&mut self.held))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_each_period_and_the_others_are_counted() {
        let mut notice = Notice::new(Duration::from_secs(10));
        let at = |secs| Time(0) + Duration::from_secs(secs);
        assert_eq!(notice.admit(at(1)), Some(0));
        for secs in [1, 5, 10] {
            assert_eq!(notice.admit(at(secs)), None);
        }
        assert_eq!(notice.admit(at(11)), Some(3));
        assert_eq!(notice.admit(at(21)), Some(0));
    }
}
