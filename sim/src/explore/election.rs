//! The election, explored: members with the real [`Brain`], their quorum
//! blocks, and a server each that follows the start and stop order of spec 09
//! section 6, with the real choice of whom to fence.
//!
//! Allowed to happen, in any order: every timeout at any moment (so clocks may
//! drift, and anybody may be paused between any two steps), every message lost,
//! repeated or late, a crash after each single effect of a step, restarts, clean
//! departures, server starts that fail, fences that kill and fences that only cut
//! the way to the devices. Blocks of a starting server are read one by one.
//! Bounded: terms, crashes, departures, failures of a start.
//!
//! A crash does not end a mount's writes: what it had queued may still land. Only
//! a fence, or the clean end of its server, does.

use super::{System, feed};
use outrider_core::env::Time;
use outrider_core::format::{InetAddr, QuorumBlock, QuorumConfig, QuorumEventKind};
use outrider_core::quorum::brain::{Effect, Input, Message, MessageKind};
use outrider_core::quorum::{
    Brain, Policy, Role, ServerPhase, Slots, fence_candidates, gives_way, stop_would_hide,
    superseded, unresolved,
};
use std::collections::VecDeque;
use std::hash::Hasher;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

const KINDS: [QuorumEventKind; 6] = [
    QuorumEventKind::Begin,
    QuorumEventKind::Term,
    QuorumEventKind::Elect,
    QuorumEventKind::Fence,
    QuorumEventKind::Stop,
    QuorumEventKind::End,
];
const MESSAGES: [MessageKind; 4] = [
    MessageKind::RequestVote,
    MessageKind::Vote,
    MessageKind::Heartbeat,
    MessageKind::Resignation,
];
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(10);

/// The bounds of an exploration.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Members, 1 to 3.
    pub members: usize,
    /// Greatest term an election may begin.
    pub terms: u64,
    /// Crashes in all.
    pub crashes: u8,
    /// Clean departures in all.
    pub departures: u8,
    /// Server starts that may fail.
    pub failures: u8,
}

/// A quorum of small bounds.
pub struct Election {
    bounds: Bounds,
    slots: Slots,
}

/// Rid and term of an event.
type Event = (u8, u64);
/// The events of one block.
type Events = [Event; 6];

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
enum Server {
    Down,
    /// Has read so many blocks.
    Reading(Vec<Events>),
    /// Waits until these rids are fenced.
    Fencing(Vec<u8>),
    /// Everybody before is fenced; waits until that is recorded.
    Fenced,
    Up,
    /// Was up, if `true`.
    Stopping(bool),
}

#[derive(Clone)]
struct Member {
    brain: Option<Brain>,
    rid: u8,
    todo: VecDeque<Effect>,
    server: Server,
    /// Asked to leave: no more turns of the loop.
    leaving: bool,
    /// Its service ended by an error: it only stops its server.
    failed: bool,
}

/// All members at one moment.
#[derive(Clone)]
pub struct State {
    members: Vec<Member>,
    blocks: Vec<Events>,
    /// Bit `index(...)`: this message may arrive, any number of times.
    messages: u128,
    /// Rids that were up and may still have writes on their way.
    writers: u32,
    fenced: u32,
    /// By slot and term: for whom it voted, plus one.
    votes: Vec<[u8; 8]>,
    crashes: u8,
    departures: u8,
    failures: u8,
}

/// Something that may happen; numbers are slots.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub enum Happening {
    Mount(usize),
    Timeout(usize),
    /// A turn of the loop because its server changed.
    Look(usize),
    Deliver {
        to: usize,
        from: usize,
        kind: MessageKind,
        term: u64,
    },
    /// The next effect of a step is carried out.
    CarryOut(usize, Effect),
    ReadBlock(usize),
    /// This server has its earlier leader killed.
    Kill(usize, u8),
    /// ... or cut off from the devices, alive.
    CutOff(usize, u8),
    FenceFails(usize),
    ServerStops(usize),
    ServerDown(usize),
    Leave(usize),
    LeaveDone(usize),
    Crash(usize),
}

fn bit(rid: u8) -> u32 {
    1 << rid
}

fn index(to: usize, from: usize, kind: MessageKind, term: u64) -> u32 {
    (((to * 3 + from) * 4 + kind as usize) * 3) as u32 + (term as u32 - 1)
}

fn event(events: &Events, kind: QuorumEventKind) -> Event {
    events[kind as usize]
}

fn block_of(events: &Events) -> QuorumBlock {
    let mut block = QuorumBlock::default();
    for kind in KINDS {
        let (rid, term) = event(events, kind);
        let target = &mut block.events[kind as usize];
        target.rid.set(u64::from(rid));
        target.term.set(term);
    }
    block
}

impl Election {
    /// A quorum that never ran.
    ///
    /// # Panics
    /// If a bound is beyond what a state holds (3 members, terms 1 to 3).
    pub fn new(bounds: Bounds) -> Self {
        assert!((1..=3).contains(&bounds.members) && (1..=3).contains(&bounds.terms));
        let mut config = QuorumConfig::default();
        for slot in 0..bounds.members {
            let addr = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 7000 + slot as u16);
            config.slots[slot] = InetAddr::from_v4(addr);
        }
        Self {
            bounds,
            slots: Slots::of(&config),
        }
    }

    fn input(&self, state: &State, who: usize, now: Time, message: Option<Message>) -> Input {
        let server = match &state.members[who].server {
            Server::Down => ServerPhase::Down,
            Server::Reading(_) | Server::Fencing(_) => ServerPhase::Starting,
            Server::Fenced => ServerPhase::Fenced,
            Server::Up => ServerPhase::Up,
            Server::Stopping(_) => ServerPhase::Stopping,
        };
        Input {
            now,
            message,
            server,
            heartbeat_timeout: HEARTBEAT_TIMEOUT,
            random: 0,
        }
    }

    fn step(&self, state: &mut State, who: usize, message: Option<Message>, late: bool) {
        let brain = state.members[who].brain.as_ref().expect("a running member");
        let timeout = brain.timeout();
        let now = if late { timeout } else { Time(timeout.0 - 1) };
        let input = self.input(state, who, now, message);
        let member = &mut state.members[who];
        let effects = member.brain.as_mut().expect("as before").step(input);
        member.todo.extend(effects);
        // What the loop does after a turn: forget a server that is down.
    }

    fn mount(&self, state: &mut State, who: usize) {
        let mut term = 0;
        let mut leader = false;
        for events in &state.blocks {
            let used = events.iter().filter(|(rid, _)| *rid != 0);
            term = used.map(|(_, term)| *term).fold(term, u64::max);
            leader |= unresolved(&block_of(events));
        }
        let member = &mut state.members[who];
        member.rid += 1;
        let rid = member.rid;
        state.blocks[who][QuorumEventKind::Begin as usize] = (rid, term);
        let input = self.input(state, who, Time(1 << 40), None);
        let policy = Policy::default();
        let brain = Brain::new(policy, &self.slots, who, term, leader, input);
        state.members[who] = Member {
            brain: Some(brain),
            rid,
            todo: VecDeque::new(),
            server: Server::Down,
            leaving: false,
            failed: false,
        };
    }

    fn post(&self, state: &mut State, to: usize, from: usize, kind: MessageKind, term: u64) {
        state.messages |= 1 << index(to, from, kind, term);
    }

    /// Writes an event; false if the member is cut off.
    fn write(&self, state: &mut State, who: usize, kind: QuorumEventKind, term: u64) -> bool {
        let rid = state.members[who].rid;
        if state.fenced & bit(rid) != 0 {
            return false;
        }
        let blocks: Vec<_> = state.blocks.iter().map(block_of).enumerate().collect();
        if kind == QuorumEventKind::Stop && stop_would_hide(u64::from(rid), who, &blocks) {
            return true;
        }
        state.blocks[who][kind as usize] = (rid, term);
        true
    }

    fn carry_out(&self, state: &mut State, who: usize) -> Result<(), String> {
        let effect = state.members[who].todo.pop_front().expect("an effect");
        match effect {
            Effect::Write(kind, term) => {
                if !self.write(state, who, kind, term) {
                    fail_service(&mut state.members[who]);
                    return Ok(());
                }
            }
            Effect::SendToOthers(kind, term) => {
                for (to, _) in self.slots.iter().filter(|(to, _)| *to != who) {
                    self.post(state, to, who, kind, term);
                }
            }
            Effect::Send(to, kind, term) => {
                if kind == MessageKind::Vote {
                    cast_vote(state, who, to, term)?;
                }
                self.post(state, to, who, kind, term);
            }
            Effect::StartServer(_) => {
                if state.members[who].server != Server::Down {
                    return Err(format!("member {who} starts a second server"));
                }
                state.members[who].server = Server::Reading(Vec::new());
            }
            Effect::MayServe => {
                if state.members[who].server == Server::Fenced {
                    let rid = state.members[who].rid;
                    state.members[who].server = Server::Up;
                    state.writers |= bit(rid);
                }
            }
            Effect::StopServer => stop_server(&mut state.members[who]),
        }
        // Sends right after a write cost nothing to be early: they may arrive late.
        while matches!(
            state.members[who].todo.front(),
            Some(Effect::SendToOthers(..) | Effect::Send(..))
        ) {
            self.carry_out(state, who)?;
        }
        Ok(())
    }

    fn read_block(&self, state: &mut State, who: usize) {
        let (blocks, member) = (&state.blocks, &mut state.members[who]);
        let Server::Reading(seen) = &mut member.server else {
            return;
        };
        seen.push(blocks[seen.len()]);
        if seen.len() < self.bounds.members {
            return;
        }
        let blocks: Vec<QuorumBlock> = seen.iter().map(block_of).collect();
        let brain = member.brain.as_ref().expect("a server's agent lives");
        let term = brain.status().server_start_term;
        let twin = gives_way(term, who, blocks.iter().enumerate(), |_| false);
        if superseded(term, &blocks) || twin {
            member.server = Server::Stopping(false);
            return;
        }
        let old = fence_candidates(term, u64::from(member.rid), blocks.iter().enumerate());
        let mut rids: Vec<u8> = old.iter().map(|c| c.rid as u8).collect();
        rids.sort_unstable();
        rids.dedup();
        rids.retain(|rid| state.fenced & bit(*rid) == 0);
        member.server = if rids.is_empty() {
            Server::Fenced
        } else {
            Server::Fencing(rids)
        };
    }

    fn fence(&self, state: &mut State, who: usize, rid: u8, kill: bool) {
        state.fenced |= bit(rid);
        if kill && let Some(victim) = state.members.iter().position(|m| m.rid == rid) {
            end(&mut state.members[victim]);
        }
        if let Server::Fencing(rids) = &mut state.members[who].server {
            rids.retain(|r| *r != rid);
            if rids.is_empty() {
                state.members[who].server = Server::Fenced;
            }
        }
    }

    fn leave_done(&self, state: &mut State, who: usize) {
        let status = state.members[who].brain.as_ref().expect("lives").status();
        let started = status.server_start_term;
        let ok = started == 0 || self.write(state, who, QuorumEventKind::Stop, started);
        if ok {
            if started > 0 {
                for (to, _) in self.slots.iter().filter(|(to, _)| *to != who) {
                    self.post(state, to, who, MessageKind::Resignation, status.term);
                }
            }
            self.write(state, who, QuorumEventKind::End, status.term);
        }
        end(&mut state.members[who]);
    }

    /// Messages that can not matter to anybody any more.
    fn prune(&self, state: &mut State) {
        for (to, member) in state.members.iter().enumerate() {
            let Some(brain) = member.brain.as_ref().filter(|_| member.todo.is_empty()) else {
                continue;
            };
            for from in 0..self.bounds.members {
                for kind in MESSAGES {
                    for term in 1..brain.status().term.min(4) {
                        state.messages &= !(1 << index(to, from, kind, term));
                    }
                }
            }
        }
    }
}

fn fail_service(member: &mut Member) {
    member.todo.clear();
    member.failed = true;
    stop_server(member);
}

fn stop_server(member: &mut Member) {
    match member.server {
        Server::Reading(_) | Server::Fencing(_) | Server::Fenced => {
            member.server = Server::Stopping(false);
        }
        Server::Up => member.server = Server::Stopping(true),
        Server::Down | Server::Stopping(_) => {}
    }
}

/// The process is gone.
fn end(member: &mut Member) {
    member.brain = None;
    member.todo.clear();
    member.server = Server::Down;
    member.leaving = false;
    member.failed = false;
}

fn cast_vote(state: &mut State, who: usize, to: usize, term: u64) -> Result<(), String> {
    let durable = KINDS.iter().map(|k| event(&state.blocks[who], *k).1).max();
    if durable < Some(term) {
        return Err(format!(
            "member {who} votes in term {term} before that term is durable"
        ));
    }
    let vote = &mut state.votes[who][term as usize];
    if *vote != 0 && *vote != to as u8 + 1 {
        return Err(format!("member {who} votes twice in term {term}"));
    }
    *vote = to as u8 + 1;
    Ok(())
}

impl System for Election {
    type State = State;
    type Event = Happening;

    fn initial(&self) -> State {
        let n = self.bounds.members;
        let member = |slot: usize| Member {
            brain: None,
            rid: slot as u8 * 8,
            todo: VecDeque::new(),
            server: Server::Down,
            leaving: false,
            failed: false,
        };
        let mut state = State {
            members: (0..n).map(member).collect(),
            blocks: vec![Events::default(); n],
            messages: 0,
            writers: 0,
            fenced: 0,
            votes: vec![[0; 8]; n],
            crashes: 0,
            departures: 0,
            failures: 0,
        };
        for who in 0..n {
            self.mount(&mut state, who);
        }
        state
    }

    fn events(&self, state: &State) -> Vec<Happening> {
        let mut out = Vec::new();
        for (who, member) in state.members.iter().enumerate() {
            let Some(brain) = &member.brain else {
                out.push(Happening::Mount(who));
                continue;
            };
            if state.crashes < self.bounds.crashes {
                out.push(Happening::Crash(who));
            }
            match &member.server {
                Server::Down | Server::Fenced => {}
                Server::Reading(_) => out.push(Happening::ReadBlock(who)),
                Server::Fencing(rids) => {
                    for rid in rids {
                        out.push(Happening::Kill(who, *rid));
                        out.push(Happening::CutOff(who, *rid));
                    }
                    if state.failures < self.bounds.failures {
                        out.push(Happening::FenceFails(who));
                    }
                }
                Server::Up => {
                    if state.failures < self.bounds.failures {
                        out.push(Happening::ServerStops(who));
                    }
                }
                Server::Stopping(_) => out.push(Happening::ServerDown(who)),
            }
            if let Some(effect) = member.todo.front() {
                out.push(Happening::CarryOut(who, *effect));
                continue;
            }
            if member.leaving || member.failed {
                if member.server == Server::Down {
                    out.push(Happening::LeaveDone(who));
                }
                continue;
            }
            if state.departures < self.bounds.departures {
                out.push(Happening::Leave(who));
            }
            let status = brain.status();
            if status.server_start_term != 0 {
                out.push(Happening::Look(who));
            }
            if status.role == Role::Leader || status.term < self.bounds.terms {
                out.push(Happening::Timeout(who));
            }
            for from in 0..self.bounds.members {
                for kind in MESSAGES {
                    for term in 1..=self.bounds.terms {
                        if state.messages >> index(who, from, kind, term) & 1 == 1 {
                            out.push(Happening::Deliver {
                                to: who,
                                from,
                                kind,
                                term,
                            });
                        }
                    }
                }
            }
        }
        out
    }

    fn apply(&self, state: &State, event: &Happening) -> Result<State, String> {
        let mut next = state.clone();
        match *event {
            Happening::Mount(who) => self.mount(&mut next, who),
            Happening::Timeout(who) => self.step(&mut next, who, None, true),
            Happening::Look(who) => self.step(&mut next, who, None, false),
            Happening::Deliver {
                to,
                from,
                kind,
                term,
            } => {
                let message = Message { kind, from, term };
                self.step(&mut next, to, Some(message), false);
            }
            Happening::CarryOut(who, _) => self.carry_out(&mut next, who)?,
            Happening::ReadBlock(who) => self.read_block(&mut next, who),
            Happening::Kill(who, rid) => self.fence(&mut next, who, rid, true),
            Happening::CutOff(who, rid) => self.fence(&mut next, who, rid, false),
            Happening::FenceFails(who) | Happening::ServerStops(who) => {
                next.failures += 1;
                stop_server(&mut next.members[who]);
            }
            Happening::ServerDown(who) => {
                let member = &mut next.members[who];
                if member.server == Server::Stopping(true) {
                    next.writers &= !bit(member.rid);
                }
                member.server = Server::Down;
            }
            Happening::Leave(who) => {
                next.departures += 1;
                next.members[who].leaving = true;
                stop_server(&mut next.members[who]);
            }
            Happening::LeaveDone(who) => {
                if next.members[who].failed {
                    end(&mut next.members[who]);
                } else {
                    self.leave_done(&mut next, who);
                }
            }
            Happening::Crash(who) => {
                next.crashes += 1;
                end(&mut next.members[who]);
            }
        }
        self.prune(&mut next);
        Ok(next)
    }

    fn check(&self, state: &State, _last: bool) -> Result<(), String> {
        let writers = state.writers & !state.fenced;
        if writers.count_ones() > 1 {
            return Err(format!(
                "two mounts may write as servers: rids {:?} (spec 09 section 14, 5)",
                (0..32)
                    .filter(|r| writers >> r & 1 == 1)
                    .collect::<Vec<u8>>()
            ));
        }
        for (slot, events) in state.blocks.iter().enumerate() {
            let term = |kind| event(events, kind).1;
            let elect = term(QuorumEventKind::Elect);
            if term(QuorumEventKind::Fence) > elect || term(QuorumEventKind::Stop) > elect {
                return Err(format!(
                    "block of slot {slot} has a FENCE or STOP after its ELECT (2)"
                ));
            }
        }
        Ok(())
    }

    fn hash(&self, state: &State, hasher: &mut dyn Hasher) {
        for member in &state.members {
            let brain = member.brain.as_ref().map(|brain| {
                let s = brain.status();
                let role = s.role as u8;
                let votes = (s.vote_for, s.vote_bits);
                let start = brain.start_term();
                (
                    s.term,
                    role,
                    s.server_start_term,
                    s.server_fenced,
                    votes,
                    start,
                )
            });
            feed(&brain, hasher);
            feed(&member.todo, hasher);
            feed(&(member.rid, member.leaving, member.failed), hasher);
            feed(&member.server, hasher);
        }
        feed(&state.blocks, hasher);
        feed(&state.messages, hasher);
        feed(&(state.writers, state.fenced), hasher);
        feed(&state.votes, hasher);
        feed(&(state.crashes, state.departures, state.failures), hasher);
    }
}
