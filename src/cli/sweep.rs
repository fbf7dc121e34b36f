//! `pilotfish sweep`: a backdoor, or how a model refuses, under an intervention at each layer in turn.

use super::args::{InterventionArgument, LayerPairs, Layers, SweepArguments, Task};
use super::eval::percent;
use super::guard::{read_mapping, read_vectors};
use super::models::load;
use super::progress::Bar;
use super::table::table;
use super::{Outcome, backdoor, prompts};
use anyhow::{Context, bail, ensure};
use pilotfish::engine::{Model, Prompt};
use pilotfish::eval::backdoor::{Candidate, LayerSweep, SweptConduct, layer_sweep, swept_layer};
use pilotfish::eval::{BackdoorInput, RefusalSweep, RefusalsAt, SteeringInput, refusal_sweep};
use pilotfish::guard::{VectorFile, carry};
use pilotfish::mapping::{MapQuality, ResidualMap};
use pilotfish::steering::stacked;
use pilotfish::tensor::{LayerIndex, LayerStack};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::{StdoutLock, Write};
use std::path::PathBuf;

pub fn sweep(arguments: SweepArguments) -> anyhow::Result<Outcome> {
    match arguments.tasks {
        Task::Backdoor | Task::Code | Task::Corrupt => of_backdoor(&arguments),
        Task::Refusal => of_refusal(&arguments),
        Task::Detection | Task::Utility | Task::Switch => {
            bail!("a sweep is of the tasks `backdoor`, `code`, `corrupt` and `refusal`")
        }
    }
}

fn of_backdoor(arguments: &SweepArguments) -> anyhow::Result<Outcome> {
    ensure!(
        arguments.positive.is_none() && arguments.negative.is_none(),
        "`--positive` and `--negative` are of the task `refusal`: a backdoor is asked `--prompts`"
    );
    let judged = backdoor::read(&[arguments.tasks], &arguments.asked, arguments.limit)?;
    let judged = judged.context("a sweep asks `--prompts`")?;
    let benign = arguments.benign.as_deref().map(prompts::read).transpose()?.unwrap_or_default();
    let file = read_vectors(&arguments.vectors)?;
    let model = load(&arguments.model)?;
    let candidates = candidates(&model, &file, arguments)?;
    let entry = arguments.acts.entry(arguments.intervene.unwrap_or(InterventionArgument::Ablate));
    let input = BackdoorInput { benign: &benign, ..judged.input(&arguments.asked, arguments.max_tokens) };
    let found = {
        let bar = Bar::new("sweeping");
        let step = &mut |done, total| bar.at(done, total);
        layer_sweep(&model, candidates, &entry, &file.model.name, input, step)?
    };
    tell(arguments, &found, |out| print(out, &found, arguments.perplexity))
}

fn of_refusal(arguments: &SweepArguments) -> anyhow::Result<Outcome> {
    ensure!(
        arguments.asked.prompts.is_none() && arguments.benign.is_none(),
        "`--prompts` and `--benign` are of backdoors: refusals are told on `--positive` and `--negative`"
    );
    let first = |path: &Option<PathBuf>, option| -> anyhow::Result<Vec<Prompt>> {
        let path = path.as_deref().with_context(|| format!("a sweep over refusals asks `--{option}`"))?;
        let mut prompts = prompts::read(path)?;
        prompts.truncate(arguments.limit);
        Ok(prompts)
    };
    let (harmful, harmless) = (first(&arguments.positive, "positive")?, first(&arguments.negative, "negative")?);
    let file = read_vectors(&arguments.vectors)?;
    let model = load(&arguments.model)?;
    let candidates = candidates(&model, &file, arguments)?;
    let entry = arguments.acts.entry(arguments.intervene.unwrap_or(InterventionArgument::Add));
    let input = SteeringInput {
        harmful: &harmful,
        harmless: &harmless,
        max_tokens: arguments.max_tokens,
        control_seeds: 0,
        system_prompt: "",
        native: None,
        wrong_layer: None,
        strengths: &[],
    };
    let found = {
        let bar = Bar::new("sweeping");
        let step = &mut |done, total| bar.at(done, total);
        refusal_sweep(&model, candidates, &entry, &file.model.name, input, step)?
    };
    tell(arguments, &found, |out| print_refusals(out, &found, arguments.perplexity))
}

/// Writes what was found where it is wanted.
fn tell<'a>(
    arguments: &SweepArguments,
    found: &impl Serialize,
    print: impl FnOnce(&mut StdoutLock<'a>) -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    if let Some(path) = &arguments.output {
        std::fs::write(path, serde_json::to_string_pretty(found)? + "\n")
            .with_context(|| format!("can't write `{}`", path.display()))?;
    }
    let mut out = std::io::stdout().lock();
    if arguments.json {
        writeln!(out, "{}", serde_json::to_string(found)?)?;
    } else {
        print(&mut out)?;
    }
    Ok(Outcome::Done)
}

/// The vectors to steer by, in the order of their layers.
fn candidates(model: &Model, file: &VectorFile, arguments: &SweepArguments) -> anyhow::Result<Vec<Candidate>> {
    let last = model.shape().n_layer - 1;
    let label = arguments.vectors.display().to_string();
    let vector_at = |layers: &LayerStack| {
        stacked(&file.vectors, layers).with_context(|| format!("there is no vector of layer {layers} in `{label}`"))
    };
    let Some(mapping) = read_mapping(arguments.mapping.as_deref(), file, &label, model)? else {
        let layers = match arguments.layers.parse::<Layers>().map_err(anyhow::Error::msg)? {
            Layers::Chosen(layers) => layers,
            Layers::Auto => {
                let known = file.vectors.iter().map(|vector| vector.layer);
                let mut layers: Vec<LayerIndex> = known.filter(|layer| layer.0 < last).collect();
                // A file has them by name, so that 10 comes before 2.
                layers.sort_unstable();
                layers
            }
        };
        let of = |layer: LayerIndex| {
            let direction = vector_at(&layer.into())?.values;
            Ok(Candidate { layer, source_layer: None, direction })
        };
        return layers.into_iter().map(of).collect();
    };
    let maps = mapping.maps();
    let carried = |map: &ResidualMap| -> anyhow::Result<Candidate> {
        let vector = vector_at(&map.source_layer())?;
        let direction = carry(map, vector.method.kind(), &vector.values, vector.class_means.as_ref())?;
        Ok(Candidate { layer: map.target_layer(), source_layer: Some(map.source_layer()), direction })
    };
    let chosen: Vec<&ResidualMap> = match arguments.layers.parse::<LayerPairs>().map_err(anyhow::Error::msg)? {
        LayerPairs::All => maps.iter().map(|(map, _)| map).collect(),
        LayerPairs::Auto => nearest(&maps, last),
        LayerPairs::Chosen(pairs) => {
            let find = |(source, target): &(LayerStack, LayerIndex)| {
                let found = maps.iter().find(|(map, _)| map.source_layer() == *source && map.target_layer() == *target);
                found.map(|(map, _)| map).with_context(|| format!("the mapping has no pair {source}:{target}"))
            };
            pairs.iter().map(find).collect::<anyhow::Result<_>>()?
        }
    };
    if chosen.is_empty() {
        bail!("the mapping has no pairs of layers");
    }
    chosen.into_iter().map(carried).collect()
}

/// For each target layer but the last the map that leaves least of it unexplained.
fn nearest(maps: &[(ResidualMap, MapQuality)], last: u32) -> Vec<&ResidualMap> {
    let mut best: BTreeMap<LayerIndex, (&ResidualMap, f64)> = BTreeMap::new();
    for (map, quality) in maps.iter().filter(|(map, _)| map.target_layer().0 < last) {
        let unexplained = quality.fraction_unexplained();
        let known = best.entry(map.target_layer()).or_insert((map, unexplained));
        if unexplained < known.1 {
            *known = (map, unexplained);
        }
    }
    best.into_values().map(|(map, _)| map).collect()
}

fn print(out: &mut impl Write, found: &LayerSweep, perplexity: f64) -> anyhow::Result<()> {
    let best = found.best(perplexity);
    let row = |swept: &SweptConduct| {
        [
            layer_named(swept.layer, swept.source_layer.as_ref(), best == Some(swept)),
            percent(swept.fires),
            percent(swept.clean),
            percent(swept.broken),
            number(swept.relative_perplexity, 2),
            percent(swept.fires_untriggered),
            number(swept.kl, 4),
        ]
    };
    let header = [
        "layer (* best)",
        "fires",
        "clean",
        "broken",
        "perplexity, times the base's",
        "untriggered, fires",
        "untriggered, KL in nats a token",
    ];
    writeln!(out, "{} prompts, {} along vectors of {}", found.prompts, found.intervention, found.vectors)?;
    writeln!(out, "{}", table(header, std::iter::once(&found.unguarded).chain(&found.layers).map(row)))?;
    Ok(())
}

fn print_refusals(out: &mut impl Write, found: &RefusalSweep, perplexity: f64) -> anyhow::Result<()> {
    let best = found.best(perplexity);
    let row = |at: &RefusalsAt| {
        [
            layer_named(at.layer, at.source_layer.as_ref(), best == Some(at)),
            percent(at.harmful.refuses.share),
            percent(at.harmless.refuses.share),
            percent(at.harmful.broken.share),
            number(at.harmless.relative_perplexity, 2),
            at.harmful.refusal_probability.map(percent).unwrap_or_default(),
            at.harmless.refusal_probability.map(percent).unwrap_or_default(),
        ]
    };
    let header = [
        "layer (* best)",
        "harmful refused",
        "harmless refused",
        "harmful broken",
        "perplexity of harmless answers, times unguarded",
        "refusing opening by the logits, harmful",
        "harmless",
    ];
    let RefusalsAt { harmful, harmless, .. } = &found.unguarded;
    writeln!(
        out,
        "{} harmful and {} harmless prompts, {} along vectors of {}",
        harmful.prompts, harmless.prompts, found.intervention, found.vectors
    )?;
    writeln!(out, "{}", table(header, std::iter::once(&found.unguarded).chain(&found.layers).map(row)))?;
    Ok(())
}

fn layer_named(layer: Option<LayerIndex>, source: Option<&LayerStack>, best: bool) -> String {
    let layer = swept_layer(layer, source);
    if best { format!("{layer} *") } else { layer }
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map(|value| format!("{value:.digits$}")).unwrap_or_default()
}
