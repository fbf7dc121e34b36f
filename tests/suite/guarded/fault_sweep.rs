//! Something goes wrong at every step of many requests in turn: those that it concerns end with their guard's error, the others are answered as if
//! nothing had happened.

use super::sequences::stacked;
use super::*;
use pilotfish::engine::scheduler::{End, Event, Request, RequestId, Scheduler, SchedulerOptions};
use pilotfish::hook::{Executor, ExecutorKind, HookFault, HostExecutor, Tensor};
use pilotfish::program::{Row, RowFault, Sequences};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Runs as the host executor does, but for its `at`th run.
struct FailsOnce {
    host: HostExecutor,
    at: usize,
    fail: fn() -> RowFault,
    runs: Arc<AtomicUsize>,
}

impl Executor for FailsOnce {
    fn kind(&self) -> ExecutorKind {
        self.host.kind()
    }

    fn run(
        &mut self,
        layer: LayerIndex,
        rows: &[Row],
        sequences: &mut Sequences,
        residual: &mut Tensor<'_>,
    ) -> Result<(), RowFault> {
        if self.runs.fetch_add(1, Ordering::Relaxed) == self.at {
            return Err((self.fail)());
        }
        self.host.run(layer, rows, sequences, residual)
    }
}

/// A way to fail, and what its error says.
type Failure = (&'static str, fn() -> RowFault);

const FAILURES: [Failure; 3] = [
    ("panicked", || panic!("as it must")),
    ("device failed", || RowFault::Device { reason: "it was taken out".into() }),
    ("values a row", || RowFault::Width { expected: 1, found: 2 }),
];

/// What came of a request: its text, or the error that it ended with.
type Outcome = Result<String, ContextError>;

/// Answers `requests`, all submitted at once, `n_sequences` at a time.
fn answer(tiny: &Tiny, requests: &[Request], n_sequences: u32, executor: Option<Box<dyn Executor>>) -> Vec<Outcome> {
    let options = SchedulerOptions { n_sequences, n_ctx: 128, n_batch: 24, ..Default::default() };
    let observer = Arc::new(Program::observer(tiny.model.shape()));
    let mut scheduler = Scheduler::new(&tiny.model, observer, options).unwrap();
    if let Some(executor) = executor {
        scheduler.set_custom_executor(executor);
    }
    let ids: Vec<RequestId> = requests.iter().map(|request| scheduler.submit(request.clone()).unwrap()).collect();
    let mut texts: BTreeMap<RequestId, String> = BTreeMap::new();
    let mut outcomes: BTreeMap<RequestId, Outcome> = BTreeMap::new();
    let on_event = &mut |event| match event {
        Event::Text { request, text } => *texts.entry(request).or_default() += &text,
        Event::Token { .. } => {}
        Event::Ended { request, summary } => {
            let text = texts.remove(&request).unwrap_or_default();
            let outcome = match summary.end {
                End::Length | End::Stop => Ok(text),
                End::Failed(error) => Err(error),
                end => panic!("{end:?}"),
            };
            assert!(outcomes.insert(request, outcome).is_none(), "it ended twice");
        }
    };
    while scheduler.step(&mut *on_event).unwrap() {}
    ids.iter().map(|id| outcomes.remove(id).expect("it has ended")).collect()
}

/// Guards at different layers: what fails at one concerns those that have a hook point there.
struct Requests {
    all: Vec<Request>,
    /// Hook points of each, and whether its guards let faults pass.
    points: Vec<(Vec<u32>, bool)>,
}

fn requests(tiny: &Tiny) -> Requests {
    let policy = |layers: &[u32]| {
        layers.iter().fold(tiny.policy(), |policy, layer| {
            let name = format!("v{layer}");
            policy.vector(&name, *layer).intervene(InterventionEntry { strength: 0.5, ..add(&name) })
        })
    };
    let guards: [(&[u32], OnError); 6] = [
        (&[0, 2], OnError::Block),
        (&[1], OnError::Block),
        (&[], OnError::Block),
        (&[1, 3], OnError::Block),
        (&[2], OnError::Pass),
        (&[0, 1, 2, 3], OnError::Block),
    ];
    let texts =
        [PROMPT, "a song of the bird", "the sea", "in the water", "pilot fish swim with the shark", "the guard"];
    let mut requests = Requests { all: Vec::new(), points: Vec::new() };
    for ((layers, on_error), text) in guards.into_iter().zip(texts) {
        let program = if layers.is_empty() {
            Arc::new(Program::observer(tiny.model.shape()))
        } else {
            stacked(tiny, &[&policy(layers).on_error(on_error).guard()])
        };
        requests.all.push(Request { program: Some(program), ..Request::new(tiny.tokens(text), 3) });
        requests.points.push((layers.to_vec(), on_error == OnError::Pass));
    }
    requests
}

#[test]
fn what_fails_at_any_step_ends_those_that_it_concerns_and_no_other() {
    for tiny in Tiny::all() {
        let Requests { all, points } = requests(&tiny);
        let expected = answer(&tiny, &all, 3, None);
        assert!(expected.iter().all(Result::is_ok), "{expected:?}");
        for (what, fail) in FAILURES {
            let mut ended = vec![0; all.len()];
            for at in 0.. {
                let runs = Arc::new(AtomicUsize::new(0));
                let host = HostExecutor::default();
                let executor = FailsOnce { host, at, fail, runs: Arc::clone(&runs) };
                let found = answer(&tiny, &all, 3, Some(Box::new(executor)));
                if runs.load(Ordering::Relaxed) <= at {
                    break;
                }
                let failed = |index: &usize| found[*index].is_err();
                let Some(first) = (0..all.len()).find(failed) else {
                    // Only those that let it pass were guarded there.
                    continue;
                };
                let Err(ContextError::Fault { fault, .. }) = &found[first] else { panic!("{:?}", found[first]) };
                assert!(fault.to_string().contains(what), "{fault}");
                let (HookFault::Row { layer, .. } | HookFault::Panic { layer: Some(layer), .. }) = fault else {
                    panic!("{fault}");
                };
                let mut n_failed = 0;
                for (index, (found, (points, passes))) in found.iter().zip(&points).enumerate() {
                    let label = format!("{}: {what} at run {at}, request {index}", tiny.name());
                    match found {
                        Err(error) => {
                            assert!(points.contains(&layer.0) && !passes, "{label}: {error}");
                            let Err(ContextError::Fault { fault: first, .. }) = &found else { unreachable!() };
                            assert_eq!(first, fault, "{label}");
                            ended[index] += 1;
                            n_failed += 1;
                        }
                        // It was unguarded for a token, if it ran then.
                        Ok(_) if *passes && points.contains(&layer.0) => {}
                        Ok(text) => assert_eq!(text, expected[index].as_ref().unwrap(), "{label}"),
                    }
                }
                assert!(n_failed <= 3, "{}: more ended than ran", tiny.name());
            }
            // Each was at risk in its prompt and at every token after it, but those that have nothing to fail or let it pass.
            for (index, (ended, (points, passes))) in ended.iter().zip(&points).enumerate() {
                let at_risk = if *passes { 0 } else { 3 * points.len() };
                let label = format!("{}: {what}: request {index}", tiny.name());
                assert!(*ended >= at_risk && (*ended == 0) == (at_risk == 0), "{label}: {ended}");
            }
        }
    }
}
