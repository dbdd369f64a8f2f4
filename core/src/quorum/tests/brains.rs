//! Brains against each other: terms, votes, leaders (spec 09 sections 2 to 5).

use super::*;

/// Members whose messages are lost, delayed and doubled, and that restart.
struct Cluster {
    entropy: Rc<TestEntropy>,
    slots: Slots,
    now: Time,
    brains: Vec<Brain>,
    /// The persisted term of each member.
    durable: Vec<u64>,
    servers: Vec<ServerPhase>,
    /// Messages on their way: (to, message).
    mail: Vec<(usize, Message)>,
    /// Who was elected in each term.
    elected: BTreeMap<u64, Vec<usize>>,
}

impl Cluster {
    fn new(seed: u64, n: u16) -> Self {
        let mut cluster = Self {
            entropy: TestEntropy::new(seed),
            slots: slots(n),
            now: Time(1_000_000_000),
            brains: Vec::new(),
            durable: vec![0; usize::from(n)],
            servers: vec![ServerPhase::Down; usize::from(n)],
            mail: Vec::new(),
            elected: BTreeMap::new(),
        };
        for slot in 0..usize::from(n) {
            let brain = cluster.fresh(slot);
            cluster.brains.push(brain);
        }
        cluster
    }

    fn input(&self, slot: usize, message: Option<Message>) -> Input {
        Input {
            now: self.now,
            message,
            server: self.servers[slot],
            heartbeat_timeout: HEARTBEAT,
            random: self.entropy.next_u64(),
        }
    }

    fn fresh(&self, slot: usize) -> Brain {
        let term = self.durable.iter().copied().max().unwrap_or(0);
        let mut input = self.input(slot, None);
        input.server = ServerPhase::Down;
        Brain::new(Policy::default(), &self.slots, slot, term, false, input)
    }

    fn turn(&mut self, slot: usize, message: Option<Message>) {
        let input = self.input(slot, message);
        for effect in self.brains[slot].step(input) {
            self.carry_out(slot, effect);
        }
    }

    fn carry_out(&mut self, slot: usize, effect: Effect) {
        match effect {
            Effect::Write(kind, term) => {
                if kind == QuorumEventKind::Term {
                    assert!(term > self.durable[slot], "terms only grow");
                    self.durable[slot] = term;
                }
                if kind == QuorumEventKind::Elect {
                    self.elected.entry(term).or_default().push(slot);
                }
                if kind == QuorumEventKind::Fence {
                    assert_eq!(self.servers[slot], ServerPhase::Fenced);
                }
                if kind == QuorumEventKind::Stop {
                    assert_eq!(self.servers[slot], ServerPhase::Down);
                }
            }
            Effect::Send(to, kind, term) => self.send(slot, to, kind, term),
            Effect::SendToOthers(kind, term) => {
                for to in (0..self.brains.len()).filter(|to| *to != slot) {
                    self.send(slot, to, kind, term);
                }
            }
            Effect::StartServer(_) => {
                assert_eq!(self.servers[slot], ServerPhase::Down, "one server");
                self.servers[slot] = ServerPhase::Starting;
            }
            Effect::MayServe => {
                if self.servers[slot] == ServerPhase::Fenced {
                    self.servers[slot] = ServerPhase::Up;
                }
            }
            Effect::StopServer => self.servers[slot] = ServerPhase::Stopping,
        }
    }

    fn send(&mut self, from: usize, to: usize, kind: MessageKind, term: u64) {
        assert!(
            self.durable[from] >= term,
            "sent before its term is durable"
        );
        self.mail.push((to, Message { kind, from, term }));
    }

    /// Something happens: mostly a delivery or a timeout.
    fn step(&mut self, faults: bool) {
        let n = self.brains.len() as u64;
        let any = self.entropy.range(0, n) as usize;
        let roll = self.entropy.range(0, 100);
        if !self.mail.is_empty() && (roll < 60 || !faults) {
            let pick = self.entropy.range(0, self.mail.len() as u64) as usize;
            let (to, message) = self.mail[pick];
            if !faults || self.entropy.chance(9, 10) {
                self.mail.swap_remove(pick);
            }
            if !faults || self.entropy.chance(4, 5) {
                self.turn(to, Some(message));
            }
            return;
        }
        match roll {
            _ if !faults => {}
            60..70 => {
                self.servers[any] = match self.servers[any] {
                    ServerPhase::Starting => ServerPhase::Fenced,
                    ServerPhase::Stopping => ServerPhase::Down,
                    other => other,
                };
            }
            70..72 => {
                // The member's host dies; another mount takes the slot.
                self.servers[any] = ServerPhase::Down;
                self.brains[any] = self.fresh(any);
            }
            72..73 if self.servers[any] == ServerPhase::Up => {
                self.servers[any] = ServerPhase::Stopping;
            }
            _ => {}
        }
        self.time_passes();
    }

    /// The next timeout comes, or servers get on.
    fn time_passes(&mut self) {
        let next = self.brains.iter().map(Brain::timeout).min();
        self.now = self.now.max(next.expect("members"));
        for slot in 0..self.brains.len() {
            if self.brains[slot].timeout() <= self.now {
                self.turn(slot, None);
            }
        }
    }
}

#[test]
fn no_term_has_two_leaders_and_a_healed_cluster_has_one() {
    for seed in 0..150 {
        let n = 3 + (seed % 3) as u16;
        let mut cluster = Cluster::new(seed, n);
        for _ in 0..2000 {
            cluster.step(true);
        }
        for (term, leaders) in &cluster.elected {
            assert_eq!(leaders.len(), 1, "seed {seed}: term {term}");
        }
        cluster.mail.clear();
        // Healed: servers move on, nothing is lost; a minute is plenty.
        let end = cluster.now + Duration::from_secs(60);
        while cluster.now < end {
            for slot in 0..usize::from(n) {
                cluster.servers[slot] = match cluster.servers[slot] {
                    ServerPhase::Starting => ServerPhase::Fenced,
                    ServerPhase::Stopping => ServerPhase::Down,
                    other => other,
                };
                cluster.turn(slot, None);
            }
            while !cluster.mail.is_empty() {
                cluster.step(false);
            }
            cluster.time_passes();
        }
        let leaders = cluster.brains.iter().filter(|b| b.status().is_leader());
        assert_eq!(leaders.count(), 1, "seed {seed}");
        let up = cluster.servers.iter().filter(|s| **s == ServerPhase::Up);
        assert_eq!(up.count(), 1, "seed {seed}");
    }
}

fn lone(now: u64, slots: &Slots, term: u64) -> (Brain, Input) {
    let input = Input {
        now: Time(now),
        message: None,
        server: ServerPhase::Down,
        heartbeat_timeout: HEARTBEAT,
        random: 0,
    };
    let brain = Brain::new(Policy::default(), slots, 0, term, false, input);
    (brain, input)
}

#[test]
fn a_single_slot_elects_itself_in_one_turn() {
    use QuorumEventKind::{Elect, Fence, Stop, Term};
    let (mut brain, mut input) = lone(5, &slots(1), 6);
    let effects = brain.step(input);
    let wanted = [
        Effect::Write(Term, 7),
        Effect::SendToOthers(MessageKind::RequestVote, 7),
        Effect::Write(Elect, 7),
        Effect::SendToOthers(MessageKind::Heartbeat, 7),
        Effect::StartServer(7),
    ];
    assert_eq!(effects, wanted);
    input.server = ServerPhase::Fenced;
    assert_eq!(
        brain.step(input),
        [Effect::Write(Fence, 7), Effect::MayServe],
        "recorded before the server may write"
    );
    assert_eq!(brain.step(input), [], "FENCE is written once");
    input.server = ServerPhase::Up;
    assert_eq!(brain.step(input), []);
    // The server stops by itself: resign, record it, and run again.
    input.server = ServerPhase::Down;
    let effects = brain.step(input);
    let wanted = [
        Effect::Write(Stop, 7),
        Effect::SendToOthers(MessageKind::Resignation, 7),
    ];
    assert_eq!(effects, wanted);
    input.now = brain.timeout();
    assert!(brain.step(input).contains(&Effect::StartServer(8)));
}

#[test]
fn a_deposed_leader_stops_its_server_before_it_runs_again() {
    let (mut brain, mut input) = lone(5, &slots(2), 6);
    input.now = brain.timeout();
    assert!(brain.step(input).contains(&Effect::StartServer(7)));
    input.server = ServerPhase::Up;
    input.message = Some(Message {
        kind: MessageKind::RequestVote,
        from: 1,
        term: 9,
    });
    let effects = brain.step(input);
    let wanted = [
        Effect::Write(QuorumEventKind::Term, 9),
        Effect::StopServer,
        Effect::Send(1, MessageKind::Vote, 9),
    ];
    assert_eq!(effects, wanted);
    // One vote for each term.
    input.message = Some(Message {
        from: 0,
        ..input.message.expect("set")
    });
    input.server = ServerPhase::Stopping;
    assert_eq!(brain.step(input), []);
    input.message = None;
    input.now = brain.timeout();
    assert_eq!(brain.step(input), [], "no election while the server stops");
    input.server = ServerPhase::Down;
    assert_eq!(
        brain.step(input),
        [Effect::Write(QuorumEventKind::Stop, 7)],
        "no resignation of one that was deposed"
    );
    input.now = brain.timeout();
    assert!(brain.step(input).contains(&Effect::StartServer(10)));
}

#[test]
fn no_vote_in_the_term_of_the_start_and_no_election_after_a_message() {
    let (mut brain, mut input) = lone(5, &slots(3), 6);
    input.message = Some(Message {
        kind: MessageKind::RequestVote,
        from: 1,
        term: 6,
    });
    assert_eq!(brain.step(input), []);
    input.message = Some(Message {
        kind: MessageKind::Heartbeat,
        from: 1,
        term: 6,
    });
    input.now = brain.timeout() + Duration::from_secs(1);
    assert_eq!(brain.step(input), [], "a late heartbeat is one");
    assert_eq!(brain.timeout(), input.now + HEARTBEAT);
    input.message = Some(Message {
        kind: MessageKind::Resignation,
        from: 1,
        term: 6,
    });
    brain.step(input);
    assert_eq!(
        brain.timeout(),
        input.now + Policy::default().election_timeout
    );
}

#[test]
fn a_leader_goes_on_sending_after_a_heartbeat_of_its_own_term() {
    let (mut brain, mut input) = lone(5, &slots(2), 6);
    input.now = brain.timeout();
    brain.step(input);
    input.server = ServerPhase::Starting;
    input.message = Some(Message {
        kind: MessageKind::Heartbeat,
        from: 1,
        term: 7,
    });
    brain.step(input);
    input.message = None;
    input.now = input.now + Duration::from_millis(100);
    let beat = Effect::SendToOthers(MessageKind::Heartbeat, 7);
    assert_eq!(brain.step(input), [beat]);
}
