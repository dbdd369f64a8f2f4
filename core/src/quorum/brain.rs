//! The election (spec 09 sections 5.1 to 5.3): one step is one turn of the
//! agent's loop, from a received datagram, or none, to a list of effects.
//!
//! Effects are carried out in order, each durable before the next: a vote leaves
//! after its term is on the device, a heartbeat after the election is. What can go
//! wrong: doing one after an earlier one failed. The agent then ends its service
//! and does none of the rest.

use super::config::Slots;
use crate::env::{Duration, Time, mutant, probe};
use crate::format::{
    QUORUM_MAX_SLOTS, QUORUM_MSG_HEARTBEAT, QUORUM_MSG_REQUEST_VOTE, QUORUM_MSG_RESIGNATION,
    QUORUM_MSG_VOTE, QuorumEventKind, QuorumMessage,
};
use zerocopy::{FromBytes, IntoBytes};

/// Times of the election (FREE within the spec's ranges).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Least time without a leader before an election.
    pub election_timeout: Duration,
    /// Random part added to it, exclusive.
    pub election_jitter: Duration,
    /// Time between a leader's heartbeats.
    pub heartbeat_interval: Duration,
    /// For how long a follower that heard its leader does not hear requests for votes
    /// in a greater term: they come from a member that was cut off and came back, and
    /// would cost a healthy leader its office. To others it looks as if the request was
    /// lost, which any of them may be (spec 09 section 5.3).
    pub leader_trust: Duration,
    /// Time between a member's attempts to take part again after its block failed.
    pub rejoin_pause: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            election_timeout: Duration::from_millis(250),
            election_jitter: Duration::from_millis(100),
            heartbeat_interval: Duration::from_millis(100),
            leader_trust: Duration::from_millis(300),
            rejoin_pause: Duration::from_millis(500),
        }
    }
}

/// Kinds of quorum messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum MessageKind {
    /// A candidate asks for a vote.
    RequestVote = QUORUM_MSG_REQUEST_VOTE,
    /// The vote.
    Vote = QUORUM_MSG_VOTE,
    /// The leader is alive.
    Heartbeat = QUORUM_MSG_HEARTBEAT,
    /// The leader gives up.
    Resignation = QUORUM_MSG_RESIGNATION,
}

/// Terms that no elections reach: each adds one. Who took such a term over, from a damaged
/// or a forged datagram or block, would record it for ever, and could soon ask for no more
/// votes.
pub const TERM_LIMIT: u64 = 1 << 63;

/// A datagram that passed the checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Kind.
    pub kind: MessageKind,
    /// Sender's slot.
    pub from: usize,
    /// Term.
    pub term: u64,
}

impl Message {
    /// Reads a datagram; `None` if it is not one of this volume's members'
    /// (spec 09 section 3), or its term is not below [`TERM_LIMIT`].
    pub fn parse(bytes: &[u8], fsid: u64, slots: &Slots) -> Option<Message> {
        let message = QuorumMessage::read_from_bytes(bytes).ok()?;
        if !message.crc_ok() || message.fsid.get() != fsid || message.term.get() >= TERM_LIMIT {
            return None;
        }
        let kind = match message.kind {
            QUORUM_MSG_REQUEST_VOTE => MessageKind::RequestVote,
            QUORUM_MSG_VOTE => MessageKind::Vote,
            QUORUM_MSG_HEARTBEAT => MessageKind::Heartbeat,
            QUORUM_MSG_RESIGNATION => MessageKind::Resignation,
            _ => return None,
        };
        let from = usize::from(message.from);
        slots.addr(from)?;
        Some(Message {
            kind,
            from,
            term: message.term.get(),
        })
    }

    /// The datagram.
    pub fn to_bytes(self, fsid: u64) -> Vec<u8> {
        let mut message = QuorumMessage {
            fsid: fsid.into(),
            term: self.term.into(),
            kind: self.kind as u8,
            from: self.from as u8,
            ..QuorumMessage::default()
        };
        message.seal();
        message.as_bytes().to_vec()
    }
}

/// What the member believes to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Role {
    /// Follows whoever leads.
    #[default]
    Follower,
    /// Asks for votes.
    Candidate,
    /// Leads.
    Leader,
}

/// Where the own server is, as the brain needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerPhase {
    /// It can not write.
    Down,
    /// It is on its way up, and writes nothing.
    Starting,
    /// All earlier leaders are fenced; it waits for that to be recorded, and
    /// writes nothing.
    Fenced,
    /// It serves.
    Up,
    /// It was asked to stop, or stops by itself, and may still write.
    Stopping,
}

/// What the agent is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Record an event in the own block, durably.
    Write(QuorumEventKind, u64),
    /// Send a message of this term to every other present slot.
    SendToOthers(MessageKind, u64),
    /// Send a message of this term to one slot.
    Send(usize, MessageKind, u64),
    /// Start the own server for this term; do not wait.
    StartServer(u64),
    /// Tell the own server that FENCE is recorded: from now on it may write.
    MayServe,
    /// Ask the own server to stop; do not wait.
    StopServer,
}

/// A copy of the state for status files (spec 09 section 5.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Own slot.
    pub slot: usize,
    /// Current term.
    pub term: u64,
    /// Role.
    pub role: Role,
    /// Term of the own server; 0 if there is none.
    pub server_start_term: u64,
    /// Whether FENCE was written for it.
    pub server_fenced: bool,
    /// Slot voted for in this term.
    pub vote_for: Option<usize>,
    /// Bit n: slot n voted for this candidate.
    pub vote_bits: u16,
    /// When something happens without a message.
    pub timeout: Time,
}

impl Status {
    /// What `is_leader` shows.
    pub fn is_leader(&self) -> bool {
        self.role == Role::Leader
    }
}

/// What one turn of the loop sees.
#[derive(Clone, Copy, Debug)]
pub struct Input {
    /// Monotonic time.
    pub now: Time,
    /// The message received, if any.
    pub message: Option<Message>,
    /// The own server.
    pub server: ServerPhase,
    /// Option quorum_heartbeat_timeout_ms as of now.
    pub heartbeat_timeout: Duration,
    /// A random number for timeouts.
    pub random: u64,
}

/// State of one member.
#[derive(Clone, Debug)]
pub struct Brain {
    policy: Policy,
    votes_needed: usize,
    /// Term the agent started in: it may have voted in it before.
    start_term: u64,
    /// When the leader of the own term was heard last.
    heard: Option<Time>,
    status: Status,
}

impl Brain {
    /// A member in `slot`, which saw `term` as the greatest of all blocks.
    /// `unresolved`: some block shows a leader that did not record its stop.
    pub fn new(
        policy: Policy,
        slots: &Slots,
        slot: usize,
        term: u64,
        unresolved: bool,
        input: Input,
    ) -> Self {
        assert!(slots.addr(slot).is_some(), "quorum slot {slot} is present");
        let mut brain = Self {
            policy,
            votes_needed: slots.votes_needed(),
            start_term: term,
            heard: None,
            status: Status {
                slot,
                term,
                ..Status::default()
            },
        };
        brain.status.timeout = if slots.count() == 1 {
            // Nobody else could be leading or become it: waiting gains nothing, and
            // what an earlier mount in this slot may still do is the fence's work.
            input.now
        } else if unresolved {
            input.now + input.heartbeat_timeout
        } else {
            brain.election_timeout(&input)
        };
        brain
    }

    /// State for status files.
    pub const fn status(&self) -> Status {
        self.status
    }

    /// The term the agent started in, in which it does not vote.
    pub const fn start_term(&self) -> u64 {
        self.start_term
    }

    /// When to take the next turn without a message.
    pub const fn timeout(&self) -> Time {
        self.status.timeout
    }

    fn election_timeout(&self, input: &Input) -> Time {
        let jitter = self.policy.election_jitter.as_nanos();
        let part = (u128::from(input.random) * jitter) >> 64;
        input.now + self.policy.election_timeout + Duration::from_nanos(part as u64)
    }

    fn follow(&mut self, term: u64) {
        self.status.role = Role::Follower;
        self.status.term = term;
        self.status.vote_for = None;
        self.status.vote_bits = 0;
        self.heard = None;
    }

    /// One turn of the loop (spec 09 section 5.3, steps 2 to 13).
    pub fn step(&mut self, input: Input) -> Vec<Effect> {
        let mut out = Vec::new();
        let heeded = |m: &Message| m.term >= self.status.term && !self.trusts_leader(m, &input);
        let message = input.message.filter(heeded);
        if let Some(message) = message {
            self.heed(message, &input, &mut out);
        }
        if self.status.role != Role::Leader && message.is_none() && input.now >= self.status.timeout
        {
            self.try_election(&input, &mut out);
        }
        self.count_votes(message, &input, &mut out);
        self.watch_server(&input, &mut out);
        if self.status.role == Role::Leader && input.now >= self.status.timeout {
            out.push(Effect::SendToOthers(
                MessageKind::Heartbeat,
                self.status.term,
            ));
            self.status.timeout = input.now + self.policy.heartbeat_interval;
        }
        self.maybe_vote(message, &mut out);
        out
    }

    /// Whether this asks for a vote against a leader that was heard just now.
    fn trusts_leader(&self, message: &Message, input: &Input) -> bool {
        let trust = self.policy.leader_trust;
        let trusts = message.kind == MessageKind::RequestVote
            && message.term > self.status.term
            && self.status.role == Role::Follower
            && self.heard.is_some_and(|at| input.now.since(at) < trust);
        if trusts {
            probe("quorum_leader_trusted");
        }
        trusts
    }

    /// Steps 3 to 5: greater terms, heartbeats, resignations.
    fn heed(&mut self, message: Message, input: &Input, out: &mut Vec<Effect>) {
        let heartbeat = message.kind == MessageKind::Heartbeat;
        if message.term > self.status.term {
            if self.status.role == Role::Leader {
                probe("quorum_leader_deposed");
                tracing::warn!(
                    own = self.status.term,
                    seen = message.term,
                    from = message.from,
                    "leader saw a greater term"
                );
            }
            self.follow(message.term);
            self.status.timeout = self.election_timeout(input);
            out.push(Effect::Write(QuorumEventKind::Term, message.term));
        }
        let leads = self.status.role == Role::Leader;
        if heartbeat && leads {
            // Two leaders of one term, of one vote each: keep the own send timer,
            // or this one falls silent (spec 09 section 15, point 4).
            probe("quorum_two_leaders_of_one_term");
        } else if heartbeat {
            self.heard = Some(input.now);
            self.status.timeout = input.now + input.heartbeat_timeout;
        }
        if message.kind == MessageKind::Resignation && self.status.role == Role::Follower {
            self.heard = None;
            self.status.timeout = self.election_timeout(input);
        }
    }

    /// Step 6: nobody leads, and nothing was heard.
    fn try_election(&mut self, input: &Input, out: &mut Vec<Effect>) {
        self.status.timeout = self.election_timeout(input);
        if input.server != ServerPhase::Down || self.status.server_start_term != 0 {
            probe("quorum_election_waits_for_own_server");
            return;
        }
        self.status.role = Role::Candidate;
        self.status.term += 1;
        self.status.vote_for = None;
        self.status.vote_bits = 1 << self.status.slot;
        out.push(Effect::Write(QuorumEventKind::Term, self.status.term));
        out.push(Effect::SendToOthers(
            MessageKind::RequestVote,
            self.status.term,
        ));
    }

    /// Steps 7 and 8.
    fn count_votes(&mut self, message: Option<Message>, input: &Input, out: &mut Vec<Effect>) {
        if self.status.role != Role::Candidate {
            return;
        }
        if let Some(vote) = message.filter(|m| m.kind == MessageKind::Vote) {
            debug_assert!(vote.from < QUORUM_MAX_SLOTS);
            let bit = 1 << vote.from;
            if self.status.vote_bits & bit != 0 {
                tracing::warn!(
                    slot = vote.from,
                    "second vote of a slot: is it used by two mounts?"
                );
            }
            self.status.vote_bits |= bit;
        }
        if (self.status.vote_bits.count_ones() as usize) < self.votes_needed {
            return;
        }
        let term = self.status.term;
        self.status.role = Role::Leader;
        self.status.timeout = input.now + self.policy.heartbeat_interval;
        self.status.server_start_term = term;
        self.status.server_fenced = false;
        out.push(Effect::Write(QuorumEventKind::Elect, term));
        out.push(Effect::SendToOthers(MessageKind::Heartbeat, term));
        out.push(Effect::StartServer(term));
    }

    /// Steps 9 to 11: what the own server's life means.
    fn watch_server(&mut self, input: &Input, out: &mut Vec<Effect>) {
        let term = self.status.term;
        let started = self.status.server_start_term;
        // Just started in this turn: `input.server` is older than that.
        if started == 0 || out.contains(&Effect::StartServer(started)) {
            return;
        }
        let leads = self.status.role == Role::Leader;
        let serves = leads && term == started;
        if serves && !self.status.server_fenced && input.server == ServerPhase::Fenced {
            self.status.server_fenced = true;
            // Recorded before the server writes anything: a later mount in this slot
            // overwrites ELECT, and then only FENCE tells whom to fence.
            out.push(Effect::Write(QuorumEventKind::Fence, term));
            out.push(Effect::MayServe);
            if mutant("fence_recorded_late") {
                out.rotate_right(1);
            }
        }
        let alive = matches!(
            input.server,
            ServerPhase::Starting | ServerPhase::Fenced | ServerPhase::Up
        );
        if !serves && alive {
            out.push(Effect::StopServer);
        }
        if input.server == ServerPhase::Down {
            // Recorded first: the others must find it when they are told.
            out.push(Effect::Write(QuorumEventKind::Stop, started));
            if leads {
                probe("quorum_leader_lost_its_server");
                self.follow(term);
                self.status.timeout = self.election_timeout(input);
                out.push(Effect::SendToOthers(MessageKind::Resignation, started));
            }
            self.status.server_start_term = 0;
            self.status.server_fenced = false;
        }
    }

    /// Step 13: one vote for each term, and none in the term of the start, in
    /// which an earlier run of this member may have voted.
    fn maybe_vote(&mut self, message: Option<Message>, out: &mut Vec<Effect>) {
        let Some(ask) = message.filter(|m| m.kind == MessageKind::RequestVote) else {
            return;
        };
        if self.status.role == Role::Follower
            // Mutant: breaks spec 09 section 5.3 step 13, one vote for each term.
            && (self.status.vote_for.is_none() || mutant("votes_twice"))
            && self.status.term != self.start_term
        {
            self.status.vote_for = Some(ask.from);
            out.push(Effect::Send(ask.from, MessageKind::Vote, self.status.term));
        }
    }
}
