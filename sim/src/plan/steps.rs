//! The steps at which mounts die: one for each row of the crash tables of spec
//! 04 section 15, 09 section 13, 10 section 14 and 11 section 10 that a probe of
//! core can tell. A sweep says which were never hit.

/// A probe, and the one that is reached when a mount dies before its next step. Plans name
/// them by their place: new ones come last.
const DEATHS: [(&str, &str); 25] = [
    ("log.commit.items", "death.after_commit_items"),
    ("log.commit.written", "death.after_commit_written"),
    ("log.commit.flushed", "death.after_commit_flushed"),
    ("log.commit.answered", "death.after_commit_answered"),
    ("locks.revoke", "death.after_revoke_began"),
    ("locks.revoke_commits", "death.after_revoke_commit_began"),
    ("data.revoke", "death.after_revoke_dropped_data"),
    ("fs.kernel_forgets", "death.after_kernel_forgets"),
    ("fs.delete_later", "death.after_delete_put_off"),
    ("client_reconnects", "death.after_client_lost_server"),
    ("conn_failover", "death.after_client_greeted_next_server"),
    ("server.fence.leader", "death.while_fencing_leader"),
    (
        "server.fence.recovery",
        "death.while_fencing_after_recovery",
    ),
    (
        "server.fence.reconnect",
        "death.while_fencing_absent_client",
    ),
    ("server.up", "death.after_server_up"),
    ("server.recovery.expired", "death.after_recovery_expired"),
    ("server.recovery.all", "death.after_recovery"),
    ("lock_server.recovered", "death.after_locks_recovered"),
    (
        "server.reclaim.open_transaction",
        "death.after_reclaim_of_open_transaction",
    ),
    ("server.merge.start", "death.after_merge_started"),
    ("server.merge.splice", "death.after_merge_splice"),
    ("server.merge.end", "death.after_merge_ended"),
    ("server.commit.failed", "death.after_server_commit_failed"),
    (
        "quorum_leader_lost_its_server",
        "death.after_leader_lost_its_server",
    ),
    ("quorum_leader_deposed", "death.after_leader_was_deposed"),
];

/// Other rows: what is reached when the message or the answer in question was lost
/// or came twice, or a member failed.
const OTHERS: [&str; 22] = [
    "client_evicted",
    "duplicate_message_dropped",
    "farewell_by_missing_item",
    "omap.answered_by_reclaim",
    "omap.asked_again",
    "omap.queued_in_recovery",
    "quorum_election_waits_for_own_server",
    "quorum_service_failed",
    "quorum_start_skips_bad_block",
    "quorum_two_leaders_of_one_term",
    "response_of_old_epoch_dropped",
    "server.commit_log_trees.resent",
    "server.farewell.absent_member",
    "server.farewell.together",
    "server.farewell.waits_for_locks",
    "server.fence.duplicate",
    "server.fence.failed",
    "server.get_log_trees.resent",
    "server.greeting.after_fence",
    "server.greeting.reclaimed_mount",
    "server.start_failed",
    "server.stopped_while_starting",
];

/// Every step that a sweep of clusters is to reach.
pub fn all() -> impl Iterator<Item = &'static str> {
    let deaths = DEATHS.iter().map(|(_, death)| *death);
    deaths.chain(OTHERS)
}

/// How many steps a mount may die at.
pub const COUNT: u8 = DEATHS.len() as u8;

/// The place of the death of that name.
///
/// # Panics
/// If there is none.
pub fn place_of(death: &str) -> u8 {
    let place = DEATHS.iter().position(|(_, name)| *name == death);
    place.expect("a step of the table") as u8
}

/// The probe at the place of a step; `None` if there is no such step.
pub(crate) fn probe_at(place: u8) -> Option<&'static str> {
    DEATHS.get(usize::from(place)).map(|(probe, _)| *probe)
}

/// The probe for a death after this one.
pub(crate) fn death_after(step: &str) -> Option<&'static str> {
    let found = DEATHS.iter().find(|(name, _)| *name == step);
    found.map(|(_, death)| *death)
}
