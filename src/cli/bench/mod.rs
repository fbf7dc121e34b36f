mod made;

use super::args::{AgainstArgument, BenchArguments, ExecutorArgument};
use super::models::load;
use super::progress::Bar;
use super::table::table;
use super::{Outcome, guard};
use anyhow::ensure;
use pilotfish::engine::{LockStep, Model, SessionOptions};
use pilotfish::guard::Guard;
use pilotfish::hook::ExecutorKind;
use pilotfish::tensor::quantile;
use serde::Serialize;
use std::io::Write;
use std::time::{Duration, Instant};

/// Speeds in tokens per second: medians over interleaved pairs, and the median and spread of each pair's ratio.
#[derive(Debug, Serialize)]
struct BenchReport {
    pairs: usize,
    /// Prefilled and decoded in one batch; speeds are of all of them together.
    sequences: u32,
    executor: String,
    against: AgainstArgument,
    prefill: Compared,
    decode: Compared,
    /// Lowest and highest ratio of all pairs, prefill and decode.
    ratio_spread: [f64; 2],
}

#[derive(Debug, Serialize)]
struct Compared {
    /// Without the guard, or whatever it is compared with.
    unguarded: f64,
    guarded: f64,
    ratio: f64,
    spread: [f64; 2],
}

pub fn bench(arguments: BenchArguments) -> anyhow::Result<Outcome> {
    ensure!(
        arguments.pairs > 0 && arguments.tokens > 0 && arguments.prompt_tokens > 0 && arguments.sequences > 0,
        "a bench needs at least one pair, one sequence, and one token of prompt and answer"
    );
    let model = load(&arguments.model)?;
    let folder = tempfile::tempdir()?;
    let guards = match arguments.guarded.intervention {
        None => guard::load_guards(&arguments.guarded.guards)?,
        Some(what) => {
            vec![made::guard(&model, what, &made::layers(arguments.points, model.shape().n_layer), folder.path())?]
        }
    };
    guard::warn_of_adapters(&model, &guards);
    let guards: Vec<&Guard> = guards.iter().collect();
    let kind = arguments.executor.map(|executor| match executor {
        ExecutorArgument::Host => ExecutorKind::Host,
        ExecutorArgument::Copy => ExecutorKind::Copy,
        ExecutorArgument::Device => ExecutorKind::Device,
    });
    let BenchArguments { sequences, prompt_tokens, tokens, pairs, against, .. } = arguments;
    let report = compare(&model, &guards, Shape { sequences, prompt_tokens, tokens, pairs, against }, kind)?;
    let mut out = std::io::stdout().lock();
    if arguments.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
    } else {
        writeln!(out, "{}", report.table())?;
    }
    Ok(Outcome::Done)
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    sequences: u32,
    /// Of each sequence.
    prompt_tokens: usize,
    tokens: usize,
    pairs: usize,
    against: AgainstArgument,
}

/// Pairs that run in the same two contexts. Where a context's memory happens to lie makes it a few percent faster or slower for as long as it
/// lives, so that many pairs in two contexts would compare places in memory.
const PAIRS_A_CONTEXT: usize = 4;

/// Runs the same tokens guarded and unguarded (or what else it is compared with) in turn, each pair in the other order than the one before, in new contexts every
/// [`PAIRS_A_CONTEXT`], which are made in the other order too.
fn compare(model: &Model, guards: &[&Guard], shape: Shape, kind: Option<ExecutorKind>) -> anyhow::Result<BenchReport> {
    let n_ctx = (shape.prompt_tokens + shape.tokens) as u32;
    let options = SessionOptions { n_ctx, ..Default::default() };
    let contexts = |guarded_first: bool| -> anyhow::Result<(LockStep<'_>, LockStep<'_>)> {
        let new = |guards: &[&Guard]| LockStep::new(model, guards, shape.sequences, options);
        let guarded = |kind: Option<ExecutorKind>| -> anyhow::Result<_> {
            let mut sequences = new(guards)?;
            if let Some(kind) = kind {
                sequences.set_executor(kind);
            }
            Ok(sequences)
        };
        let early = if guarded_first { Some(guarded(kind)?) } else { None };
        let other = match shape.against {
            AgainstArgument::Unguarded => new(&[])?,
            AgainstArgument::Copy => guarded(Some(ExecutorKind::Copy))?,
        };
        Ok((other, early.map_or_else(|| guarded(kind), Ok)?))
    };
    let text = model.prompt_tokens("The pilot fish swims beside the shark and keeps it clean. ")?;
    // Each sequence begins at another place of the text, so that no two are alike.
    let tokens = |sequence: u32, from: usize, n: usize| -> Vec<_> {
        text.iter().copied().cycle().skip(sequence as usize % text.len() + from).take(n).collect()
    };
    let prompts: Vec<_> = (0..shape.sequences).map(|sequence| tokens(sequence, 0, shape.prompt_tokens)).collect();
    let answers: Vec<Vec<_>> = (0..shape.tokens)
        .map(|step| {
            let position = shape.prompt_tokens + step;
            (0..shape.sequences).flat_map(|sequence| tokens(sequence, position, 1)).collect()
        })
        .collect();
    let time = |context: &mut LockStep<'_>| -> anyhow::Result<[f64; 2]> {
        let n_sequences = shape.sequences as usize;
        let start = Instant::now();
        context.prefill(&prompts)?;
        let prefill = start.elapsed();
        let start = Instant::now();
        for (index, tokens) in answers.iter().enumerate() {
            context.step(shape.prompt_tokens + index, tokens)?;
        }
        let decode = start.elapsed();
        Ok([per_second(n_sequences * shape.prompt_tokens, prefill), per_second(n_sequences * shape.tokens, decode)])
    };

    let bar = Bar::new("timing");
    let mut pairs = Vec::with_capacity(shape.pairs);
    let (mut unguarded, mut guarded) = contexts(false)?;
    for pair in 0..shape.pairs {
        if pair % PAIRS_A_CONTEXT == 0 {
            if pair > 0 {
                drop((unguarded, guarded));
                (unguarded, guarded) = contexts(pair / PAIRS_A_CONTEXT % 2 == 1)?;
            }
            // Once each before anything counts: the first run pages memory in.
            time(&mut unguarded)?;
            time(&mut guarded)?;
        }
        pairs.push(if pair % 2 == 0 {
            let without = time(&mut unguarded)?;
            (without, time(&mut guarded)?)
        } else {
            let with = time(&mut guarded)?;
            (time(&mut unguarded)?, with)
        });
        bar.at(pair + 1, shape.pairs);
    }
    let compared = |phase: usize| {
        let median = |values: Vec<f64>| quantile(&values, 0.5);
        let ratios: Vec<f64> = pairs.iter().map(|(without, with)| with[phase] / without[phase]).collect();
        Compared {
            unguarded: median(pairs.iter().map(|(without, _)| without[phase]).collect()),
            guarded: median(pairs.iter().map(|(_, with)| with[phase]).collect()),
            spread: [quantile(&ratios, 0.0), quantile(&ratios, 1.0)],
            ratio: median(ratios),
        }
    };
    let (prefill, decode) = (compared(0), compared(1));
    let ratio_spread = [prefill.spread[0].min(decode.spread[0]), prefill.spread[1].max(decode.spread[1])];
    let Shape { pairs, sequences, against, .. } = shape;
    // Not what was asked for: what the residual's place allows.
    let executor = guarded.executor().map(|kind| kind.to_string()).unwrap_or_default();
    Ok(BenchReport { pairs, sequences, executor, against, prefill, decode, ratio_spread })
}

impl BenchReport {
    fn table(&self) -> String {
        let row = |name: &str, compared: &Compared| {
            [
                name.to_owned(),
                format!("{:.1}", compared.unguarded),
                format!("{:.1}", compared.guarded),
                format!("{:.3}", compared.ratio),
                format!("{:.3} – {:.3}", compared.spread[0], compared.spread[1]),
            ]
        };
        table(
            ["tokens per second", self.against.name(), "guarded", "ratio (median of pairs)", "spread"],
            [row("prefill", &self.prefill), row("decode", &self.decode)],
        )
        .to_string()
    }
}

fn per_second(tokens: usize, time: Duration) -> f64 {
    tokens as f64 / time.as_secs_f64()
}
