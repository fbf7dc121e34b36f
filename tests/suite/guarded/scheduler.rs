//! Continuous batching: requests that join and leave as they come, each answered as if it were alone.

use super::sequences::{requests, stacked};
use super::*;
use pilotfish::engine::scheduler::{End, Event, Request, RequestId, Scheduler, SchedulerOptions, Summary};
use pilotfish::engine::{EngineError, Sampling};
use rand::seq::SliceRandom;

pub(super) const OPTIONS: SchedulerOptions =
    SchedulerOptions { n_sequences: 3, n_ctx: 256, n_batch: 32, queue: 64, reuse_prefixes: true };

/// What a caller has seen of a request.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub text: String,
    pub summary: Option<Summary>,
}

impl Seen {
    pub fn end(&self) -> &End {
        &self.summary.as_ref().expect("it has ended").end
    }

    /// All of it that another run must repeat.
    pub fn told(&self) -> (&str, usize, Vec<(&str, bool)>) {
        let summary = self.summary.as_ref().unwrap();
        let gates = summary.gates.iter().map(|gate| (gate.gate.as_str(), gate.fired)).collect();
        (&self.text, summary.tokens, gates)
    }
}

/// A scheduler and what its callers have seen.
pub(super) struct Calls<'m> {
    pub scheduler: Scheduler<'m>,
    pub seen: BTreeMap<RequestId, Seen>,
}

impl<'m> Calls<'m> {
    pub fn new(tiny: &'m Subject, options: SchedulerOptions) -> Self {
        let observer = Arc::new(Program::observer(tiny.model.shape()));
        Self::under(tiny, &observer, options)
    }

    pub fn under(tiny: &'m Subject, program: &Arc<Program>, options: SchedulerOptions) -> Self {
        let scheduler = Scheduler::new(&tiny.model, Arc::clone(program), options).unwrap();
        Self { scheduler, seen: BTreeMap::new() }
    }

    pub fn step(&mut self) -> bool {
        let seen = &mut self.seen;
        let on_event = |event| match event {
            Event::Text { request, text } => {
                assert!(!text.is_empty());
                let seen = seen.entry(request).or_default();
                assert!(seen.summary.is_none(), "text after the end");
                seen.text += &text;
            }
            Event::Token { .. } => {}
            Event::Ended { request, summary } => {
                assert!(seen.entry(request).or_default().summary.replace(summary).is_none(), "two ends");
            }
        };
        self.scheduler.step(on_event).unwrap()
    }

    pub fn finish(&mut self) {
        while self.step() {}
        assert_eq!(self.scheduler.load(), (0, 0));
    }

    /// The whole answer to one request.
    pub fn answer(&mut self, request: Request) -> Seen {
        let id = self.scheduler.submit(request).unwrap();
        self.finish();
        self.seen.remove(&id).unwrap()
    }
}

#[test]
fn requests_that_join_and_leave_are_answered_as_if_alone() {
    for tiny in Tiny::all() {
        let asked: Vec<Request> = requests(&tiny)
            .into_iter()
            .enumerate()
            .map(|(index, asked)| Request { program: Some(asked.program), ..Request::new(asked.prompt, 3 + 2 * index) })
            .collect();
        let alone = |request: &Request| {
            Calls::new(&tiny, SchedulerOptions { n_sequences: 1, ..OPTIONS }).answer(request.clone())
        };
        let expected: Vec<Seen> = asked.iter().map(alone).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for (n_sequences, n_batch) in [(1, 32), (3, 32), (3, 5), (8, 128), (8, 9)] {
            let mut calls = Calls::new(&tiny, SchedulerOptions { n_sequences, n_batch, ..OPTIONS });
            let mut order: Vec<usize> = (0..asked.len()).collect();
            order.shuffle(&mut rng);
            let mut ids = BTreeMap::new();
            for index in order {
                ids.insert(calls.scheduler.submit(asked[index].clone()).unwrap(), index);
                for _ in 0..rng.random_range(0..4) {
                    calls.step();
                }
            }
            calls.finish();
            for (id, index) in ids {
                let what = format!("{}: {n_sequences} at once, {n_batch} rows: request {index}", tiny.name());
                assert_eq!(calls.seen[&id].told(), expected[index].told(), "{what}");
                assert!(matches!(calls.seen[&id].end(), End::Length | End::Stop), "{what}");
            }
        }
    }
}

#[test]
fn an_answer_ends_before_its_stop_string() {
    let tiny = Tiny::new(Architecture::Llama);
    let prompt = tiny.script().prompt;
    let mut calls = Calls::new(&tiny, OPTIONS);
    let whole = calls.answer(Request::new(prompt.clone(), 24));
    // Some text in the middle, which begins and ends within tokens wherever it may.
    let characters: Vec<char> = whole.text.chars().collect();
    let stop: String = characters[characters.len() / 2..][..3].iter().collect();
    let seen = calls.answer(Request { stop: vec!["never this".into(), stop.clone()], ..Request::new(prompt, 24) });
    assert!(matches!(seen.end(), End::StopString(1)), "{:?}", seen.end());
    assert_eq!(seen.text, whole.text[..whole.text.find(&stop).unwrap()]);
}

#[test]
fn the_end_of_its_room_is_the_end_of_an_answer() {
    let tiny = Tiny::new(Architecture::Llama);
    let prompt = tiny.script().prompt;
    let options = SchedulerOptions { n_ctx: prompt.len() as u32 + 5, ..OPTIONS };
    let mut calls = Calls::new(&tiny, options);
    let seen = calls.answer(Request::new(prompt.clone(), 100));
    // The last token has no place, and needs none: nothing is read from it.
    assert!(matches!(seen.end(), End::ContextFull) && seen.summary.as_ref().unwrap().tokens == 6, "{seen:?}");
    let too_long = calls.scheduler.submit(Request::new(prompt.repeat(2), 1));
    assert!(matches!(too_long, Err(EngineError::PromptTooLong { .. })), "{too_long:?}");
    let empty = calls.scheduler.submit(Request::new(Vec::new(), 1));
    assert!(matches!(empty, Err(EngineError::EmptyPrompt)), "{empty:?}");
    let none = calls.answer(Request::new(prompt, 0));
    assert!(matches!(none.end(), End::Length) && none.text.is_empty(), "{none:?}");
}

/// llama.cpp refuses the whole batch, and with it what others asked.
#[test]
fn a_prompt_of_tokens_that_there_are_not_is_refused_alone() {
    let tiny = Tiny::new(Architecture::Llama);
    let request = || Request::new(tiny.script().prompt, 8);
    let expected = Calls::new(&tiny, OPTIONS).answer(request());
    let mut calls = Calls::new(&tiny, OPTIONS);
    let sane = calls.scheduler.submit(request()).unwrap();
    calls.step();
    for odd in [-1, i32::MIN, tiny.model.llama().n_vocab(), i32::MAX] {
        let prompt = [tiny.script().prompt, vec![LlamaToken(odd)]].concat();
        let found = calls.scheduler.submit(Request::new(prompt, 8));
        assert!(matches!(found, Err(EngineError::NoToken { token, .. }) if token == odd), "{found:?}");
    }
    calls.finish();
    assert_eq!(calls.seen[&sane].told(), expected.told());
}

#[test]
fn a_queue_has_an_end_and_cancelling_makes_room() {
    let tiny = Tiny::new(Architecture::Llama);
    let request = || Request::new(tiny.script().prompt, 50);
    let mut calls = Calls::new(&tiny, SchedulerOptions { n_sequences: 1, queue: 2, ..OPTIONS });
    let expected = Calls::new(&tiny, OPTIONS).answer(request());
    let running = calls.scheduler.submit(request()).unwrap();
    calls.step();
    let waiting = [calls.scheduler.submit(request()).unwrap(), calls.scheduler.submit(request()).unwrap()];
    assert!(matches!(calls.scheduler.submit(request()), Err(EngineError::QueueFull { capacity: 2 })));
    let summary = calls.scheduler.cancel(waiting[0]).unwrap().unwrap();
    assert!(matches!(summary.end, End::Cancelled));
    calls.step();
    calls.step();
    let summary = calls.scheduler.cancel(running).unwrap().unwrap();
    assert!(matches!(summary.end, End::Cancelled) && (1..50).contains(&summary.tokens), "{summary:?}");
    assert!(calls.scheduler.cancel(running).unwrap().is_none());
    calls.finish();
    // The next that has its sequence finds nothing of it there.
    assert_eq!(calls.seen[&waiting[1]].told(), expected.told());
}

#[test]
fn one_that_is_blocked_or_fails_leaves_the_others() {
    let tiny = Tiny::new(Architecture::Llama);
    let script = tiny.script();
    let gated = |on_fire| {
        let guard = tiny.policy().vector("g", 1).gate(gate("g", Aggregate::Last, -NEVER, on_fire)).guard();
        Some(stacked(&tiny, &[&guard]))
    };
    let sane = || Request::new(script.prompt.clone(), 10);
    let expected = Calls::new(&tiny, OPTIONS).answer(sane());
    let mut calls = Calls::new(&tiny, OPTIONS);
    // Each fits in `f32`, both do not, which the next hook point finds.
    let push = || InterventionEntry { strength: 3e38, ..add("v") };
    let policy = tiny.policy().vector("v", 1).vector("w", 2).intervene(push()).intervene(called("again", push()));
    let overflow = policy.intervene(add("w")).guard();
    let ids = [
        sane(),
        Request { program: gated(OnFire::Block), ..sane() },
        Request { program: Some(stacked(&tiny, &[&overflow])), ..sane() },
        Request { program: gated(OnFire::Steer), ..sane() },
    ]
    .map(|request| calls.scheduler.submit(request).unwrap());
    calls.finish();
    let [first, blocked, failed, last] = ids.map(|id| calls.seen.remove(&id).unwrap());
    assert_eq!(first.told(), expected.told());
    assert_eq!(last.text, expected.text);
    assert!(last.summary.unwrap().gates[0].fired);
    let End::Blocked(block) = blocked.end() else { panic!("{blocked:?}") };
    let message = block.to_string();
    assert!(message.contains("not this") && blocked.text.is_empty(), "{message}");
    assert!(matches!(failed.end(), End::Failed(ContextError::Fault { .. })), "{failed:?}");
}

#[test]
fn a_swapped_program_is_for_requests_to_come() {
    let tiny = Tiny::new(Architecture::Llama);
    let program = |strength| {
        let entry = InterventionEntry { strength, ..add("v") };
        stacked(&tiny, &[&tiny.policy().vector("v", 1).intervene(entry).guard()])
    };
    let (old, new) = (program(3.0), program(-3.0));
    let request = || Request::new(tiny.script().prompt, 12);
    let by = [&old, &new].map(|program| Calls::under(&tiny, program, OPTIONS).answer(request()).text);
    assert_ne!(by[0], by[1]);
    let mut calls = Calls::under(&tiny, &old, OPTIONS);
    let first = calls.scheduler.submit(request()).unwrap();
    calls.step();
    // One that waits when the program is swapped keeps the one it was submitted under.
    let waits = calls.scheduler.submit(request()).unwrap();
    calls.scheduler.set_program(Arc::clone(&new)).unwrap();
    let second = calls.scheduler.submit(request()).unwrap();
    calls.finish();
    let texts = [first, waits, second].map(|id| calls.seen[&id].text.as_str());
    assert_eq!(texts, [by[0].as_str(), &by[0], &by[1]]);
}

#[test]
fn sampling_is_by_its_seed_and_each_sequence_has_its_own() {
    let tiny = Tiny::new(Architecture::Llama);
    let request = |seed| {
        let sampling = Sampling { temperature: 1.5, top_k: 40, top_p: 0.95, min_p: 0.01, seed, ..Default::default() };
        Request { sampling, ..Request::new(tiny.script().prompt, 16) }
    };
    let alone = [1, 2].map(|seed| Calls::new(&tiny, OPTIONS).answer(request(seed)).text);
    assert_ne!(alone[0], alone[1]);
    let mut calls = Calls::new(&tiny, OPTIONS);
    let ids = [1, 2, 1].map(|seed| calls.scheduler.submit(request(seed)).unwrap());
    calls.finish();
    assert_eq!(ids.map(|id| calls.seen[&id].text.as_str()), [alone[0].as_str(), &alone[1], &alone[0]]);
    // A bias that nothing outweighs, and a penalty that no token comes back from.
    let token = tiny.tokens(" shark")[1];
    let biased = Sampling { logit_bias: vec![(token, 1e4)], ..Default::default() };
    let text = Calls::new(&tiny, OPTIONS).answer(Request { sampling: biased, ..request(1) }).text;
    assert_eq!(text, " shark".repeat(16));
    for penalty_last_n in [-1, i32::MAX] {
        let bias = vec![(token, 1e4)];
        let once = Sampling { logit_bias: bias, presence_penalty: 1e6, penalty_last_n, ..Default::default() };
        let seen = Calls::new(&tiny, OPTIONS).answer(Request { sampling: once, ..request(1) });
        assert!(seen.summary.as_ref().unwrap().tokens > 1 && seen.text.matches(" shark").count() == 1, "{seen:?}");
    }
}

/// What a request has of another one's reading, and that its answer is as if it had read all itself.
pub(super) mod prefixes {
    use super::*;
    use pilotfish::guard::Positions;

    /// Turns of a conversation: what the user says, and what comes between that and the answer before it.
    pub const TURNS: [&str; 3] = [
        "the shark eats things in the sea and the bird has a song",
        " and what eats the shark in the water of the sea",
        " so the pilot fish swims with the shark",
    ];

    fn options(reuse_prefixes: bool) -> SchedulerOptions {
        SchedulerOptions { reuse_prefixes, ..OPTIONS }
    }

    /// A conversation in which every prompt is all that was said before it and the next turn: the tokens of each prompt, and what came of it.
    fn converse(calls: &mut Calls<'_>, tiny: &Subject, program: &Arc<Program>) -> Vec<(Vec<LlamaToken>, Seen)> {
        let mut said: Vec<LlamaToken> = Vec::new();
        let mut turns = Vec::new();
        for turn in TURNS {
            let tokens = tiny.tokens(turn);
            said.extend(&tokens[usize::from(!said.is_empty())..]);
            let request = Request { program: Some(Arc::clone(program)), ..Request::new(said.clone(), 9) };
            let seen = calls.answer(request);
            turns.push((said.clone(), seen));
            // Not what the model said, which may be no text that has these tokens: what it might have.
            said.extend(&tiny.tokens(&turns.last().unwrap().1.text)[1..]);
        }
        turns
    }

    pub fn scores(seen: &Seen) -> Vec<f64> {
        seen.summary.as_ref().unwrap().gates.iter().map(|gate| gate.score.unwrap()).collect()
    }

    #[derive(Debug, Clone, Copy, PartialEq)]
    pub enum Reuse {
        /// Prompt and answer, as far as they agree.
        All,
        /// The prompt but its last token.
        Prompt,
    }

    pub type Case = (&'static str, fn(Policy<'_>) -> Policy<'_>, Reuse);

    fn when(rule: &str, entry: InterventionEntry) -> InterventionEntry {
        InterventionEntry { when: Some(rule.into()), ..entry }
    }

    pub const CASES: &[Case] = &[
        (
            "an addition of strength 0",
            |policy| policy.vector("v", 1).intervene(InterventionEntry { strength: 0.0, ..add("v") }),
            Reuse::All,
        ),
        (
            "gates that read",
            |policy| {
                let policy = policy.vector("a", 0).vector("b", 1).vector("c", 2).vector("d", 3);
                let policy = policy.gate(gate("a", Aggregate::Mean, NEVER, OnFire::Block));
                let policy = policy.gate(gate("b", Aggregate::Max, -NEVER, OnFire::Steer));
                policy.gate(gate("d", Aggregate::Last, -NEVER, OnFire::Steer)).gate(token_gate("c", 0.2, Some(-0.2)))
            },
            Reuse::All,
        ),
        ("an addition everywhere", |policy| policy.vector("v", 1).intervene(add("v")), Reuse::All),
        (
            "an addition to answers",
            |policy| policy.vector("v", 1).intervene(InterventionEntry { positions: Positions::Generated, ..add("v") }),
            Reuse::Prompt,
        ),
        (
            "an addition to prompts",
            |policy| policy.vector("v", 1).intervene(InterventionEntry { positions: Positions::Prompt, ..add("v") }),
            Reuse::Prompt,
        ),
        (
            "an addition to a text",
            |policy| {
                let positions = Positions::Matching(" eats the sha".into());
                policy.vector("v", 1).intervene(InterventionEntry { positions, ..add("v") })
            },
            Reuse::All,
        ),
        (
            "an addition to a text, by a gate that opens",
            |policy| {
                let policy = policy.vector("g", 0).gate(gate("g", Aggregate::Mean, -NEVER, OnFire::Steer));
                let positions = Positions::Matching(" eats".into());
                policy.vector("v", 1).intervene(InterventionEntry { positions, ..when("g", add("v")) })
            },
            Reuse::Prompt,
        ),
        (
            "a gate that opens",
            |policy| {
                let policy = policy.vector("g", 0).gate(gate("g", Aggregate::Mean, -NEVER, OnFire::Steer));
                policy.vector("v", 1).intervene(when("g", add("v")))
            },
            Reuse::Prompt,
        ),
        (
            "a gate that stays shut",
            |policy| {
                let policy = policy.vector("g", 0).gate(gate("g", Aggregate::Mean, NEVER, OnFire::Steer));
                policy.vector("v", 1).intervene(when("g", add("v")))
            },
            Reuse::All,
        ),
        (
            "a rule that a gate must not have opened",
            |policy| {
                let policy = policy.vector("g", 0).gate(gate("g", Aggregate::Max, NEVER, OnFire::Steer));
                policy.vector("v", 1).intervene(when("not g", add("v")))
            },
            Reuse::Prompt,
        ),
        (
            "a token gate that comes and goes",
            |policy| {
                let policy = policy.vector("t", 0).gate(token_gate("t", 0.1, Some(-0.1)));
                policy.vector("v", 1).intervene(when("t", add("v")))
            },
            Reuse::All,
        ),
        (
            "a token gate beside one of the prompt",
            |policy| {
                let policy = policy.vector("t", 0).gate(token_gate("t", 0.1, None));
                let policy = policy.vector("g", 0).gate(gate("g", Aggregate::Last, NEVER, OnFire::Steer));
                policy.vector("v", 1).intervene(when("t and not g", add("v")))
            },
            Reuse::Prompt,
        ),
    ];

    #[test]
    fn a_conversation_is_answered_as_if_read_anew() {
        for tiny in Tiny::all() {
            for (what, policy, reuse) in CASES {
                let what = format!("{}: {what}", tiny.name());
                let program = stacked(&tiny, &[&policy(tiny.policy()).guard()]);
                let mut with = Calls::new(&tiny, options(true));
                let turns = converse(&mut with, &tiny, &program);
                let mut before: Option<&Vec<LlamaToken>> = None;
                for (turn, (prompt, seen)) in turns.iter().enumerate() {
                    let what = format!("{what}, turn {turn}");
                    let request = Request { program: Some(Arc::clone(&program)), ..Request::new(prompt.clone(), 9) };
                    let anew = Calls::new(&tiny, options(false)).answer(request);
                    assert_eq!(seen.told(), anew.told(), "{what}");
                    for (found, expected) in scores(seen).iter().zip(scores(&anew)) {
                        let apart = (found - expected).abs();
                        assert!(apart <= 1e-2 * (1.0 + expected.abs()), "{what}: {found} and {expected}");
                    }
                    assert_eq!(anew.summary.as_ref().unwrap().reused_tokens, 0);
                    let reused = seen.summary.as_ref().unwrap().reused_tokens;
                    match (before, reuse) {
                        (None, _) => assert_eq!(reused, 0, "{what}"),
                        // The last token of the turn before was its prompt's end.
                        (Some(before), Reuse::Prompt) => assert_eq!(reused, before.len() - 1, "{what}"),
                        (Some(before), Reuse::All) => assert!(reused >= before.len(), "{what}: {reused}"),
                    }
                    before = Some(prompt);
                }
            }
        }
    }

    /// Requests that begin alike, while the first of them still runs: by a copy of its cells.
    #[test]
    fn a_running_request_lends_what_it_has_read() {
        for tiny in Tiny::all() {
            for (what, policy, _) in CASES {
                let what = format!("{}: {what}", tiny.name());
                let program = stacked(&tiny, &[&policy(tiny.policy()).guard()]);
                let request = |tail: &str| {
                    let prompt = [tiny.tokens(PROMPT), tiny.tokens(tail)[1..].to_vec()].concat();
                    Request { program: Some(Arc::clone(&program)), ..Request::new(prompt, 12) }
                };
                let tails = [" in the sea", " with a song", " of the shark", " and the guard"];
                let mut calls = Calls::new(&tiny, SchedulerOptions { n_batch: 64, ..options(true) });
                let mut ids = vec![calls.scheduler.submit(request(tails[0])).unwrap()];
                calls.step();
                calls.step();
                ids.extend(tails[1..].iter().map(|tail| calls.scheduler.submit(request(tail)).unwrap()));
                calls.finish();
                for (id, tail) in ids.iter().zip(tails) {
                    let anew = Calls::new(&tiny, options(false)).answer(request(tail));
                    assert_eq!(calls.seen[id].told(), anew.told(), "{what}: `{tail}`");
                    let reused = calls.seen[id].summary.as_ref().unwrap().reused_tokens;
                    let expected = if tail == tails[0] { 0 } else { tiny.tokens(PROMPT).len() };
                    assert!(reused >= expected && (expected > 0 || reused == 0), "{what}: `{tail}`: {reused}");
                }
            }
        }
    }

    /// A copy of all that a running request holds, for a token or two that a free sequence lacks, would cost more than reading them.
    #[test]
    fn a_few_tokens_more_are_read_and_not_copied() {
        let tiny = Tiny::new(Architecture::Llama);
        let first = tiny.tokens(PROMPT);
        let with = |n: usize| Request::new([&first[..], &vec![first[1]; n]].concat(), 8);
        for (more, expected) in [(2, first.len()), (20, first.len() + 20)] {
            let mut calls = Calls::new(&tiny, SchedulerOptions { n_sequences: 2, n_batch: 64, ..options(true) });
            let running = calls.scheduler.submit(with(more)).unwrap();
            calls.step();
            // In the other sequence, and ended at once.
            let ended = calls.scheduler.submit(Request::new(first[..].to_vec(), 1)).unwrap();
            while calls.seen.get(&ended).is_none_or(|seen| seen.summary.is_none()) {
                calls.step();
            }
            assert!(calls.seen.get(&running).is_none_or(|seen| seen.summary.is_none()), "it runs");
            let next = calls.scheduler.submit(with(more + 1)).unwrap();
            calls.finish();
            let (found, anew) = (&calls.seen[&next], Calls::new(&tiny, options(false)).answer(with(more + 1)));
            assert_eq!(found.told(), anew.told());
            assert_eq!(found.summary.as_ref().unwrap().reused_tokens, expected, "{more} more");
        }
    }

    #[test]
    fn what_another_epoch_or_another_guard_read_is_read_anew() {
        let tiny = Tiny::new(Architecture::Llama);
        let program = |strength| {
            let entry = InterventionEntry { strength, ..add("v") };
            stacked(&tiny, &[&tiny.policy().vector("v", 1).intervene(entry).guard()])
        };
        let prompt = || tiny.script().prompt;
        let reused = |seen: &Seen| seen.summary.as_ref().unwrap().reused_tokens;
        let mut calls = Calls::under(&tiny, &program(1.0), options(true));
        assert_eq!(reused(&calls.answer(Request::new(prompt(), 4))), 0);
        assert_eq!(reused(&calls.answer(Request::new(prompt(), 4))), prompt().len() - 1);
        let own = Request { program: Some(program(2.0)), ..Request::new(prompt(), 4) };
        assert_eq!(reused(&calls.answer(own.clone())), 0);
        assert_eq!(reused(&calls.answer(own)), prompt().len() - 1);
        assert_eq!(reused(&calls.answer(Request::new(prompt(), 4))), prompt().len() - 1, "it is still there");
        // The same guard, loaded anew.
        calls.scheduler.set_program(program(1.0)).unwrap();
        assert_eq!(reused(&calls.answer(Request::new(prompt(), 4))), 0);
    }

    /// A request that is cut off or blocked in its prompt lends no more than it has read.
    #[test]
    fn a_cancelled_request_lends_what_it_has_read() {
        let tiny = Tiny::new(Architecture::Gemma3);
        let request = || Request::new(tiny.tokens(&PROMPT.repeat(3)), 6);
        let expected = Calls::new(&tiny, options(false)).answer(request());
        let mut calls = Calls::new(&tiny, SchedulerOptions { n_batch: 8, ..options(true) });
        let cut = calls.scheduler.submit(request()).unwrap();
        calls.step();
        calls.step();
        calls.scheduler.cancel(cut).unwrap().unwrap();
        let seen = calls.answer(request());
        assert_eq!(seen.told(), expected.told());
        assert_eq!(seen.summary.unwrap().reused_tokens, 16);
    }
}
