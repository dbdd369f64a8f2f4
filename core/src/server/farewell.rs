//! Farewells: letting mounts go without leaving those behind that could no longer
//! elect a server for their own (spec 08 section 9).

use super::actor::Server;
use super::recovery::Kind;
use crate::env::{Notify, probe};
use crate::format::{MOUNTED_CLIENT_FLAG_QUORUM, MountedClient};
use crate::quorum::Slots;
use crate::wire::listener::Origin;
use bytes::Bytes;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Farewells that wait for their turn.
#[derive(Debug, Default)]
pub(super) struct Farewells {
    waiting: RefCell<BTreeMap<u64, Origin>>,
    kick: Notify,
}

impl Farewells {
    /// A mount said farewell.
    pub(super) fn push(&self, origin: Origin) {
        self.waiting.borrow_mut().insert(origin.rid, origin);
        self.kick();
    }

    /// Something changed that farewells may wait for.
    pub(super) fn kick(&self) {
        self.kick.notify_one();
    }

    /// The session of a mount is gone, and with it who would hear the answer.
    pub(super) fn forget(&self, rid: u64) {
        self.waiting.borrow_mut().remove(&rid);
    }
}

/// Which of the mounts in `leaving`, in this order, may go now. `mounted` are all
/// mounts with an item.
///
/// Mounts that are not quorum members go at once, and members as long as a
/// majority stays. The last majority goes together, when nobody else is left.
pub fn may_leave(
    leaving: &[u64],
    mounted: &[(u64, MountedClient)],
    votes_needed: usize,
) -> Vec<u64> {
    let is_member = |client: &MountedClient| client.flags & MOUNTED_CLIENT_FLAG_QUORUM != 0;
    let item = |rid: u64| {
        mounted
            .iter()
            .find(|(m, _)| *m == rid)
            .map(|(_, client)| client)
    };
    let (mut members, mut others) = (0, 0);
    for (_, client) in mounted {
        *(if is_member(client) {
            &mut members
        } else {
            &mut others
        }) += 1;
    }
    let mut go = Vec::new();
    let mut asking = Vec::new();
    for &rid in leaving {
        match item(rid) {
            None => go.push(rid),
            Some(client) if is_member(client) => asking.push(rid),
            Some(_) => {
                go.push(rid);
                others -= 1;
            }
        }
    }
    let mut left = asking.len();
    for rid in asking {
        if members > votes_needed || (left == members && others == 0) {
            go.push(rid);
            members -= 1;
            left -= 1;
        }
    }
    go
}

/// Takes members out of `go` if those who would stay, as far as they are `here`, could
/// elect nobody. A member that is not here may be dead: it helps nobody until it is back,
/// and until it is fenced and reclaimed it counts in [`may_leave`] as if it were. While
/// clients of the server before `may_come`, it may also be alive, and be left behind.
pub fn keep_majority(
    go: &mut Vec<u64>,
    mounted: &[(u64, MountedClient)],
    votes_needed: usize,
    here: impl Fn(u64) -> bool,
    may_come: bool,
) {
    let is_member = |client: &MountedClient| client.flags & MOUNTED_CLIENT_FLAG_QUORUM != 0;
    loop {
        let stay = || {
            let stay = mounted.iter().filter(|(rid, _)| !go.contains(rid));
            stay.filter(|(rid, _)| here(*rid))
        };
        let members = stay().filter(|(_, client)| is_member(client)).count();
        let all_leave = mounted.iter().all(|(rid, _)| go.contains(rid));
        let nobody_stays = all_leave || (stay().next().is_none() && !may_come);
        if members >= votes_needed || nobody_stays {
            return;
        }
        let of_member = |rid: &u64| {
            mounted
                .iter()
                .any(|(m, client)| m == rid && is_member(client))
        };
        let Some(last) = go.iter().rposition(of_member) else {
            return;
        };
        probe("server.farewell.absent_member");
        go.remove(last);
    }
}

impl Server {
    /// Answers farewells as they may be answered, until the server stops.
    pub(super) async fn answer_farewells(self: Rc<Self>) {
        while self
            .unless_stopping(self.farewells.kick.notified())
            .await
            .is_some()
        {
            if let Err(err) = self.let_go().await {
                return self.fail(err.fatal());
            }
        }
    }

    fn is_here(&self, rid: u64) -> bool {
        self.peers().is_some_and(|peers| peers.is_connected(rid))
    }

    /// Lets those go that may go now. All of them are reclaimed before the first is
    /// answered: an answer may end the mount that this server lives in, and who leaves
    /// with it would find no other server.
    ///
    /// Once the mount that this server lives in was let go, the server ends at any moment,
    /// and nobody else is let go: some of a last majority would be left behind.
    async fn let_go(self: &Rc<Self>) -> super::error::Result<()> {
        if self.departed.borrow().contains(&self.config.rid) {
            probe("server.farewell.own_mount_has_left");
            return Ok(());
        }
        // The locks of one whose locks are still awaited would be recovered after it
        // left, and never go away. Until then it does not count as leaving.
        let awaited = |rid: &u64| self.recovery.borrow().is_pending(*rid, Kind::Locks);
        let asking: Vec<u64> = self.farewells.waiting.borrow().keys().copied().collect();
        let (wait, leaving): (Vec<u64>, Vec<u64>) = asking.into_iter().partition(awaited);
        if !wait.is_empty() {
            probe("server.farewell.waits_for_locks");
        }
        if leaving.is_empty() {
            return Ok(());
        }
        let mounted = self.store.mounted().await?;
        let votes = Slots::of(&self.store.stable().qconf).votes_needed();
        let mut go = may_leave(&leaving, &mounted, votes);
        let here = |rid: u64| leaving.contains(&rid) || self.is_here(rid);
        let may_come = self.recovery.borrow().may_come();
        keep_majority(&mut go, &mounted, votes, here, may_come);
        self.reclaim_all(&go).await?;
        if go.len() > 1 {
            probe("server.farewell.together");
        }
        for rid in &go {
            let origin = self.farewells.waiting.borrow_mut().remove(rid);
            if let (Some(origin), Some(peers)) = (origin, self.peers()) {
                // A client that is not there finds its item gone.
                let _ = peers.respond(&origin, Ok(Bytes::new()));
            }
        }
        if !go.is_empty() {
            // Those that waited for them may go now.
            self.farewells.kick();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(members: &[u64], others: &[u64]) -> Vec<(u64, MountedClient)> {
        let client = |flags| MountedClient {
            flags,
            ..MountedClient::default()
        };
        let members = members
            .iter()
            .map(|rid| (*rid, client(MOUNTED_CLIENT_FLAG_QUORUM)));
        members
            .chain(others.iter().map(|rid| (*rid, client(0))))
            .collect()
    }

    #[test]
    fn members_beyond_the_majority_leave_freely() {
        let all = mounts(&[1, 2, 3], &[8]);
        assert_eq!(may_leave(&[1], &all, 2), [1]);
        assert_eq!(may_leave(&[1, 2], &all, 2), [1]);
        assert_eq!(may_leave(&[1, 2, 3], &all, 2), [1]);
    }

    #[test]
    fn the_last_majority_leaves_together_after_everybody_else() {
        let all = mounts(&[1, 2], &[8]);
        assert_eq!(may_leave(&[1, 2], &all, 2), Vec::<u64>::new());
        assert_eq!(may_leave(&[1, 2, 8], &all, 2), [8, 1, 2]);
        let rest = mounts(&[1, 2], &[]);
        assert_eq!(may_leave(&[1], &rest, 2), Vec::<u64>::new());
        assert_eq!(may_leave(&[1, 2], &rest, 2), [1, 2]);
    }

    #[test]
    fn a_single_mount_leaves() {
        assert_eq!(may_leave(&[1], &mounts(&[1], &[]), 1), [1]);
        assert_eq!(may_leave(&[1], &mounts(&[1], &[9]), 1), Vec::<u64>::new());
    }

    #[test]
    fn a_member_that_is_not_there_does_not_count_as_staying() {
        let all = mounts(&[1, 2, 3], &[]);
        let go = |leaving: &[u64], absent: u64, votes| {
            let mut go = may_leave(leaving, &all, votes);
            keep_majority(&mut go, &all, votes, |rid| rid != absent, false);
            go
        };
        assert_eq!(go(&[1], 9, 2), [1]);
        assert_eq!(go(&[1], 3, 2), Vec::<u64>::new(), "2 could elect nobody");
        assert_eq!(go(&[1, 2], 3, 2), Vec::<u64>::new(), "nor whoever is last");
        let pair = mounts(&[1, 2], &[]);
        let mut go = may_leave(&[1], &pair, 1);
        keep_majority(&mut go, &pair, 1, |rid| rid != 2, false);
        assert_eq!(go, [1], "nobody is left behind");
    }

    #[test]
    fn who_may_still_come_to_a_new_server_is_not_left_behind() {
        // 3 is alive and on its way; 4 and 5 are dead, and not fenced yet.
        let all = mounts(&[1, 2, 3, 4, 5], &[]);
        let go = |may_come| {
            let mut go = may_leave(&[1, 2], &all, 3);
            keep_majority(&mut go, &all, 3, |rid| rid < 3, may_come);
            go
        };
        assert_eq!(go(true), Vec::<u64>::new());
        assert_eq!(go(false), [1, 2], "their time is up");
        let rest = mounts(&[1, 2, 3], &[]);
        let mut go = may_leave(&[1, 2, 3], &rest, 3);
        keep_majority(&mut go, &rest, 3, |_| true, true);
        assert_eq!(go, [1, 2, 3], "nobody stays");
    }

    #[test]
    fn who_was_reclaimed_already_is_answered() {
        assert_eq!(may_leave(&[7], &mounts(&[1, 2], &[]), 2), [7]);
    }
}
