use super::Outcome;
use super::args::{
    AgainstModel, AggregateArgument, BuildArguments, GuardCommand, LoadArguments, LoraArgument, OnFireArgument,
    ReadoutArgument,
};
use super::learn::best_layer;
use super::models::{load, load_named};
use super::progress::Bar;
use super::{prompts, switch, table::table};
use anyhow::{Context, bail, ensure};
use pilotfish::engine::{GuardOptions, Model, Session, SessionOptions, probe_of};
use pilotfish::guard::manifest::{GateEntry, InterventionEntry, MappingEntry, MappingKind, Scope, VectorEntry};
use pilotfish::guard::{
    AdapterIdentity, Aggregate, Digest, Guard, MAPPING_SUFFIX, Manifest, MappingFile, OnError, OnFire, Readout, Source,
    VectorFile, carry, class_mean_tensors, extend_guard, from_control_vector, write_guard,
};
use pilotfish::hook::ExecutorKind;
use pilotfish::learn::{self, Classes};
use pilotfish::mapping::{AffineMap, MapQuality, MappingQuality, ResidualMap};
use pilotfish::program::Calibration;
use pilotfish::steering::{ControlVector, PromptTokens, SteeringVector, VectorKind, stacked};
use pilotfish::tensor::{LayerIndex, LayerStack, norm};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// What the probe of a guard asks: plain English that every model has seen the like of.
pub const PROBE_PROMPT: &str = "The pilot fish swims beside the shark, eats what it leaves, and keeps it clean.";

pub fn guard(command: GuardCommand) -> anyhow::Result<Outcome> {
    match command {
        GuardCommand::Build(arguments) => build(*arguments)?,
        GuardCommand::Inspect { guard, against, json } => inspect(&guard, &against, json)?,
        GuardCommand::Verify { guard, against } => verify(&guard, &against)?,
        GuardCommand::Import { file, name, model, lora, strength, output } => {
            let bytes = read(&file)?;
            let vector = ControlVector::from_gguf(&bytes).with_context(|| format!("`{}`", file.display()))?;
            let model = load_named(&model, &lora, &LoadArguments::default())?;
            let (manifest, tensors) = from_control_vector(&name, &vector, model.identity(), f64::from(strength));
            let guard = write_guard(&output, &manifest, &tensors, &[])?;
            eprintln!("wrote guard `{}` with {} vectors to {}", guard.name(), guard.vectors().len(), output.display());
        }
    }
    Ok(Outcome::Done)
}

/// Loads and validates a guard folder.
pub fn load_guard(directory: &Path) -> anyhow::Result<Guard> {
    Ok(Guard::load(directory)?)
}

pub fn load_guards(directories: &[PathBuf]) -> anyhow::Result<Vec<Guard>> {
    directories.iter().map(|directory| load_guard(directory)).collect()
}

/// Applies `--strength NAME=X`, with several guards `GUARD/NAME=X`.
pub fn set_strengths(guards: &mut [Guard], strengths: &[String]) -> anyhow::Result<()> {
    for strength in strengths {
        let problem = |expected: &str| format!("`--strength {strength}`: expected {expected}");
        let parsed = strength.split_once('=').and_then(|(name, value)| Some((name, value.parse().ok()?)));
        let (name, value) = parsed.with_context(|| problem("`NAME=X`"))?;
        let (of, name) = name.split_once('/').map_or((None, name), |(guard, name)| (Some(guard), name));
        let known = guards.iter().map(|guard| format!("`{}`", guard.name())).collect::<Vec<_>>().join(", ");
        let guard = match (of, &mut *guards) {
            (None, [only]) => only,
            (None, []) => bail!(problem("a `--guard` that it is for")),
            (None, _) => bail!(problem(&format!("`GUARD/NAME=X`, where GUARD is one of {known}"))),
            (Some(of), guards) => guards
                .iter_mut()
                .find(|guard| guard.name() == of)
                .with_context(|| problem(&format!("a guard among {known}, found `{of}`")))?,
        };
        *guard = guard.with_strength(name, value)?;
    }
    Ok(())
}

pub fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("can't read `{}`", path.display()))
}

/// Reads the mapping, if one is given, that carries `vectors`, read from the file `label`, to `model`. Without one they must be its own.
pub fn read_mapping(
    path: Option<&Path>,
    vectors: &VectorFile,
    label: &str,
    model: &Model,
) -> anyhow::Result<Option<MappingFile>> {
    let (from, to) = (&vectors.model, model.identity());
    let Some(path) = path else {
        ensure!(
            from.fingerprint == to.fingerprint,
            "the vectors in `{label}` are of {}, not of {}: give `--mapping`",
            from.name,
            to.name
        );
        return Ok(None);
    };
    let mapping = MappingFile::from_bytes(&path.display().to_string(), &read(path)?)?;
    ensure!(
        mapping.source.fingerprint == from.fingerprint,
        "`{}` maps from {}, but the vectors in `{label}` are of {}",
        path.display(),
        mapping.source.name,
        from.name
    );
    ensure!(
        mapping.target.fingerprint == to.fingerprint,
        "`{}` maps to {}, but the model is {}",
        path.display(),
        mapping.target.name,
        to.name
    );
    Ok(Some(mapping))
}

/// Reads a file of vectors, as `extract` writes it.
pub fn read_vectors(path: &Path) -> anyhow::Result<VectorFile> {
    Ok(VectorFile::from_bytes(&path.display().to_string(), &read(path)?)?)
}

/// Says which guards were made for other adapters than the model carries. It is no error: a guard may well do for a model's variants, which
/// its probe decides.
pub fn warn_of_adapters<'a>(model: &Model, guards: impl IntoIterator<Item = &'a Guard>) {
    for guard in guards {
        if let Some(what) = guard.target().other_adapters(model.identity()) {
            eprintln!("warning: guard `{}` {what}", guard.name());
        }
    }
}

/// The model that `guard` is to be held against, if there is one, with its name.
fn load_against<'a>(against: &'a AgainstModel, guard: &Guard) -> anyhow::Result<Option<(&'a str, Model)>> {
    let Some(name) = &against.model else { return Ok(None) };
    let load = LoadArguments { gpu_layers: against.gpu_layers, ..Default::default() };
    let model = load_named(name, &against.lora, &load)?;
    warn_of_adapters(&model, [guard]);
    Ok(Some((name, model)))
}

fn verify(directory: &Path, against: &AgainstModel) -> anyhow::Result<()> {
    let guard = load_guard(directory)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}: files verified, sha256 {}", guard.name(), guard.content_hash())?;
    if let Some((name, model)) = load_against(against, &guard)? {
        // Making a session checks the fingerprint, compiles, asks the probe and runs dry.
        Session::new(&model, &[&guard], SessionOptions { n_ctx: 256, guard: lenient(&guard) })?;
        writeln!(out, "{}: is for {name}; its probe is answered and every hook point fires", guard.name())?;
    }
    Ok(())
}

/// A guard that is not calibrated yet can be looked at, but not run.
fn lenient(guard: &Guard) -> GuardOptions {
    let calibrated = guard.gates().iter().all(|gate| gate.calibration.is_some() && gate.threshold.is_some());
    let calibration = if calibrated { Calibration::Required } else { Calibration::Ignored };
    GuardOptions { calibration, probe: true }
}

/// How residuals are reached, each way once and with the layers where it is taken.
fn executors(session: &Session<'_>) -> Vec<(ExecutorKind, Vec<LayerIndex>)> {
    let mut ways: Vec<(ExecutorKind, Vec<LayerIndex>)> = Vec::new();
    for (layer, kind) in session.executors() {
        match ways.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, layers)) => layers.push(layer),
            None => ways.push((kind, vec![layer])),
        }
    }
    ways
}

fn inspect(directory: &Path, against: &AgainstModel, json: bool) -> anyhow::Result<()> {
    let guard = load_guard(directory)?;
    let executors = load_against(against, &guard)?
        .map(|(_, model)| -> anyhow::Result<_> {
            let session = Session::new(&model, &[&guard], SessionOptions { n_ctx: 256, guard: lenient(&guard) })?;
            Ok(executors(&session))
        })
        .transpose()?;
    let executor = executors.as_ref().map(|ways| {
        let names: Vec<String> = ways.iter().map(|(kind, _)| kind.to_string()).collect();
        names.join("+")
    });
    let mut out = std::io::stdout().lock();
    let text = |value: Option<String>| value.unwrap_or_else(|| "–".into());
    if json {
        let gates: Vec<_> = guard
            .gates()
            .iter()
            .map(|gate| {
                let vector = &guard.vectors()[gate.vector];
                serde_json::json!({ "name": gate.name, "vector": vector.name, "kind": vector.kind, "layer": vector.layer,
                    "threshold": gate.threshold, "reads": gate.scope.to_string(), "readout": gate.readout, "on_fire": gate.on_fire })
            })
            .collect();
        let interventions: Vec<_> = guard
            .interventions()
            .iter()
            .map(|intervention| {
                serde_json::json!({ "name": intervention.name, "on": guard.operand_of(intervention), "layer": guard.layer_of(intervention),
                    "kind": intervention.kind.name(), "strength": intervention.strength, "positions": intervention.positions,
                    "when": intervention.when.as_ref().map(|rule| guard.written(rule)) })
            })
            .collect();
        let value = serde_json::json!({
            "name": guard.name(), "description": guard.description(), "sha256": guard.content_hash().to_string(),
            "on_error": guard.on_error(), "architecture": guard.target().architecture,
            "fingerprint": guard.target().fingerprint.to_string(), "adapters": guard.target().adapters, "source": guard.source().map(|source| &source.model),
            "executor": executor, "executors": executors.map(|ways| {
                let layers = ways.iter().flat_map(|(kind, layers)| layers.iter().map(move |layer| (layer, kind)));
                layers.map(|(layer, kind)| (layer.to_string(), kind.to_string())).collect::<BTreeMap<_, _>>()
            }),
            "gates": gates, "interventions": interventions, "results": guard.results(),
        });
        writeln!(out, "{value}")?;
        return Ok(());
    }
    writeln!(out, "{}: {}", guard.name(), guard.description())?;
    writeln!(out, "for {} {}", guard.target().architecture, guard.target().fingerprint)?;
    if !guard.target().adapters.is_empty() {
        writeln!(out, "made for it {}", AdapterIdentity::listed(&guard.target().adapters))?;
    }
    if let Some(source) = guard.source() {
        writeln!(out, "learnt on {} {}", source.model, source.fingerprint)?;
    }
    for (kind, layers) in executors.unwrap_or_default() {
        let layers: Vec<String> = layers.iter().map(LayerIndex::to_string).collect();
        writeln!(out, "executor: {kind}, at layer {}", layers.join(", "))?;
    }
    let vectors = guard.vectors().iter().map(|vector| {
        [
            vector.name.clone(),
            format!("{:?}", vector.kind).to_lowercase(),
            vector.layer.to_string(),
            format!("{:.2}", norm(&vector.direction)),
            text(vector.mapped_from.as_ref().map(|from| {
                // The regression that carried it.
                let unexplained = match (vector.kind, from.quality) {
                    (VectorKind::Discriminant, MapQuality::Affine(MappingQuality { backward: Some(backward), .. })) => {
                        backward.fraction_unexplained
                    }
                    (_, quality) => quality.fraction_unexplained(),
                };
                format!("layer {} by `{}`, {unexplained:.2} unexplained", from.layer, from.mapping)
            })),
        ]
    });
    writeln!(out, "{}", table(["vector", "kind", "layer", "norm", "mapped from"], vectors))?;
    if !guard.gates().is_empty() {
        let gates = guard.gates().iter().map(|gate| {
            [
                gate.name.clone(),
                guard.vectors()[gate.vector].name.clone(),
                gate.scope.to_string(),
                gate.readout.name().to_owned(),
                text(gate.threshold.map(|threshold| format!("{threshold:+.2}"))),
                format!("{:?}", gate.on_fire).to_lowercase(),
            ]
        });
        writeln!(out, "{}", table(["gate", "vector", "reads", "readout", "threshold", "on fire"], gates))?;
    }
    if !guard.interventions().is_empty() {
        let interventions = guard.interventions().iter().map(|intervention| {
            [
                intervention.name.clone(),
                intervention.kind.name().to_owned(),
                guard.operand_of(intervention).to_owned(),
                intervention.strength.to_string(),
                on_one_line(&intervention.positions.to_string()),
                text(intervention.when.as_ref().map(|rule| guard.written(rule))),
            ]
        });
        writeln!(out, "{}", table(["intervention", "kind", "vector", "strength", "positions", "when"], interventions))?;
    }
    for result in guard.results() {
        writeln!(out, "{}: {:.3} on {}", result.name, result.value, result.on)?;
    }
    Ok(())
}

/// Text of any characters as one line of a table.
fn on_one_line(text: &str) -> String {
    let mut line = String::new();
    for character in text.chars() {
        if character.is_control() { line.extend(character.escape_default()) } else { line.push(character) }
    }
    line
}

fn build(arguments: BuildArguments) -> anyhow::Result<()> {
    let target = load(&arguments.model)?;
    if let Some(name) = &arguments.switch {
        let guard = switch::build(&target, name, &arguments)?;
        eprintln!("wrote guard `{}` to {}", guard.name(), arguments.output.display());
        return Ok(());
    }
    ensure!(
        arguments.when.is_none() || arguments.intervene.is_some(),
        "`--when` says when an intervention acts: give `--intervene KIND` or `--switch` too"
    );
    let vectors = arguments.vectors.context("a guard is built from `--vectors`, or as a `--switch`")?;
    let choose_on = prompts::read_contrasts(&arguments.positive, &arguments.negative)?;
    let choice = match &arguments.layer {
        Some(layer) => LayerChoice::Given(layer),
        None if choose_on.is_empty() => LayerChoice::Best,
        None => LayerChoice::Separating {
            sets: choose_on.iter().map(prompts::Contrasted::classes).collect(),
            source: arguments.source.as_deref(),
            lora: &arguments.source_lora,
            load: &arguments.model.load,
        },
    };
    let policy = Policy {
        name: arguments.name,
        description: arguments.description,
        gate: arguments.gate,
        aggregate: arguments.aggregate.map(|aggregate| match aggregate {
            AggregateArgument::Last => Aggregate::Last,
            AggregateArgument::Mean => Aggregate::Mean,
            AggregateArgument::Max => Aggregate::Max,
        }),
        readout: arguments.readout.map(|readout| match readout {
            ReadoutArgument::Projection => Readout::Projection,
            ReadoutArgument::Standardized => Readout::Standardized,
        }),
        on_fire: match arguments.on_fire {
            OnFireArgument::Steer => OnFire::Steer,
            OnFireArgument::Block => OnFire::Block,
        },
        intervention: arguments.intervene.map(|kind| arguments.acts.entry(kind)),
        on_error: arguments.on_error.into(),
        message: arguments.message,
        baked: arguments.baked,
        when: arguments.when,
        onto: arguments.onto,
    };
    build_to(&target, &vectors, arguments.mapping.as_deref(), choice, policy, &arguments.output)
}

/// What a guard built from one vector does.
struct Policy {
    name: String,
    description: String,
    gate: Option<String>,
    /// Or what suits the vectors.
    aggregate: Option<Aggregate>,
    readout: Option<Readout>,
    on_fire: OnFire,
    intervention: Option<InterventionEntry>,
    on_error: OnError,
    message: Option<String>,
    baked: bool,
    /// Instead of the gate.
    when: Option<String>,
    /// A guard to add to.
    onto: Option<PathBuf>,
}

/// Which layer of the vectors, or which pair of the mapping, a guard is built on.
enum LayerChoice<'a> {
    /// `L`, or `S:T` with a mapping.
    Given(&'a str),
    /// Where the mapped vector best tells these prompts apart in the target, each judged by a vector made without it in the source.
    Separating { sets: Vec<Classes<'a>>, source: Option<&'a str>, lora: &'a [LoraArgument], load: &'a LoadArguments },
    /// The mapping's pair that leaves least unexplained; without a mapping, the layer with the highest cross-validated AUC.
    Best,
}

/// Composes vectors and mapping under `policy` into a guard for `target`, with a probe of it, and writes it.
fn build_to(
    target: &Model,
    vectors: &Path,
    mapping: Option<&Path>,
    choice: LayerChoice<'_>,
    policy: Policy,
    output: &Path,
) -> anyhow::Result<()> {
    ensure!(
        policy.gate.is_some() || policy.intervention.is_some(),
        "a guard needs `--gate NAME`, `--intervene KIND` or both"
    );
    let vectors_label = vectors.display().to_string();
    let file = read_vectors(vectors)?;
    let mapping = read_mapping(mapping, &file, &vectors_label, target)?;
    let first = file.vectors.first().with_context(|| format!("there is no vector in `{vectors_label}`"))?;
    let kind = first.method.kind();
    let aggregate = match (policy.aggregate, &first.tokens) {
        (Some(aggregate), _) => aggregate,
        (None, PromptTokens::Last) => Aggregate::Last,
        (None, PromptTokens::Mean) => Aggregate::Mean,
        (None, other) => {
            ensure!(
                policy.gate.is_none(),
                "no gate reads the tokens `{other}` that the vectors were made from: say with `--aggregate` what it is to read"
            );
            Aggregate::Last
        }
    };
    let readout = policy.readout.unwrap_or(match kind {
        VectorKind::Direction if mapping.is_some() && !policy.baked => Readout::Standardized,
        VectorKind::Direction | VectorKind::Discriminant => Readout::Projection,
    });
    let maps = mapping.as_ref().map(MappingFile::maps).unwrap_or_default();
    ensure!(mapping.is_none() || !maps.is_empty(), "the mapping has no pairs of layers");
    let (vector, map) = choose(target, &file, &maps, readout, choice)?;

    let name = vector.name.clone();
    let (mut mappings, mut mapping_files) = (Vec::new(), Vec::new());
    let carried = match (&mapping, map) {
        (Some(mapping), Some(map)) if !policy.baked => {
            // Only the pair that is used, and only the way it is used: a guard is to be small.
            let pair_name = format!(
                "{}-{}-to-{}-{}",
                mapping.source.name,
                map.source_layer().to_string().replace('+', "."),
                mapping.target.name,
                map.target_layer()
            );
            let (source_layer, target_layer) = (map.source_layer(), map.target_layer());
            let (mapping_kind, only) = only_pair(mapping, map, kind);
            let bytes = only.to_bytes()?;
            mappings.push(MappingEntry {
                name: pair_name.clone(),
                sha256: Digest::of(&bytes),
                kind: mapping_kind,
                source_layer,
                target_layer,
            });
            mapping_files.push((format!("{pair_name}{MAPPING_SUFFIX}"), bytes));
            Some(pair_name)
        }
        _ => None,
    };
    let in_target = match map {
        Some(map) => carry(map, kind, &vector.values, vector.class_means.as_ref())
            .with_context(|| format!("the mapping can't carry vector `{name}` of `{vectors_label}`"))?,
        None => vector.values.clone(),
    };
    let target_layer = map.map_or(vector.layer, |map| map.target_layer());
    let (layer, values) = match map {
        Some(map) if carried.is_some() => (map.source_layer(), vector.values.clone()),
        _ => (target_layer.into(), in_target.clone()),
    };
    // A plus is no character of names.
    let tensor = format!("{name}.{}", layer.to_string().replace('+', "."));
    let mut tensors = vec![(tensor.clone(), values)];
    // What is carried is the difference of the two: the vector alone would not do.
    if let (Some(ResidualMap::Autoencoder(_)), Some(_), Some(means)) = (map, &carried, &vector.class_means) {
        tensors.extend(class_mean_tensors(&tensor).into_iter().zip([means.positive.clone(), means.negative.clone()]));
    }

    let source = map.map(|_| Source { model: file.model.name.clone(), fingerprint: file.model.fingerprint });
    let last_layer = target.shape().n_layer - 1;
    // At the last layer only rows with logits exist, so a probe over a prompt's tokens can't be taken there.
    let probe = (target_layer.0 < last_layer)
        .then(|| probe_of(target, PROBE_PROMPT, &name, target_layer, &in_target))
        .transpose()?;
    let mut manifest = Manifest {
        description: policy.description,
        on_error: policy.on_error,
        message: policy.message,
        source,
        vectors: vec![VectorEntry {
            name: name.clone(),
            layer,
            tensor: tensor.clone(),
            kind,
            mapping: carried,
            method: Some(vector.method.to_string()),
            mean_norm: Some(vector.mean_norm),
        }],
        mappings,
        gates: policy
            .gate
            .iter()
            .map(|gate| GateEntry {
                name: gate.clone(),
                vector: name.clone(),
                scope: Scope::Prompt,
                aggregate: Some(aggregate),
                positions: None,
                readout,
                threshold: None,
                release: None,
                mean: None,
                deviation: None,
                on_fire: policy.on_fire,
                calibrations: Vec::new(),
            })
            .collect(),
        interventions: policy
            .intervention
            .into_iter()
            .map(|intervention| InterventionEntry {
                vector: Some(name.clone()),
                when: policy.when.clone().or_else(|| policy.gate.clone()),
                ..intervention
            })
            .collect(),
        ..Manifest::new(policy.name, target.identity())
    };
    manifest.target.probe = probe;
    let guard = match &policy.onto {
        Some(onto) => extend_guard(onto, output, manifest, &tensors, &mapping_files)?,
        None => write_guard(output, &manifest, &tensors, &mapping_files)?,
    };
    eprintln!("wrote guard `{}` to {}", guard.name(), output.display());
    Ok(())
}

/// The file with `map` alone, and of it only what carries vectors of `kind`.
fn only_pair(mapping: &MappingFile, map: &ResidualMap, kind: VectorKind) -> (MappingKind, MappingFile) {
    let source_layer = map.source_layer();
    let is_it = |source: &LayerStack, target| *source == source_layer && target == map.target_layer();
    let mut only = mapping.clone();
    only.pairs.retain(|(pair, _)| is_it(pair.source_layer(), pair.target_layer()));
    only.autoencoders.retain(|(pair, _)| is_it(&pair.source_layer().into(), pair.target_layer()));
    only.replacements.retain(|(source, target), _| is_it(source, *target));
    if kind == VectorKind::Direction {
        let forward = |(map, quality): (AffineMap, MappingQuality)| {
            (map.without_backward(), MappingQuality { backward: None, ..quality })
        };
        only.pairs = only.pairs.into_iter().map(forward).collect();
    }
    let mapping_kind = match map {
        ResidualMap::Affine(_) => MappingKind::Affine,
        ResidualMap::Autoencoder(_) => MappingKind::Autoencoder,
    };
    (mapping_kind, only)
}

/// The model that the vectors were learnt on, to make them anew without some prompts.
fn source_of(
    file: &VectorFile,
    name: Option<&str>,
    lora: &[LoraArgument],
    load: &LoadArguments,
) -> anyhow::Result<Model> {
    let known = &file.model;
    let source = load_named(name.unwrap_or(&known.name), lora, load).with_context(|| {
        format!("choosing layers by prompts needs the model that the vectors are of, `{}`: give `--source`", known.name)
    })?;
    ensure!(
        source.identity().fingerprint == known.fingerprint,
        "the vectors are of {}, and {} is another model",
        known.name,
        source.identity().name
    );
    ensure!(
        AdapterIdentity::alike(&source.identity().adapters, &known.adapters),
        "the vectors are of {} {}: give it the same with `--source-lora`",
        known.name,
        AdapterIdentity::listed(&known.adapters)
    );
    Ok(source)
}

fn choose<'a>(
    target: &Model,
    file: &VectorFile,
    maps: &'a [(ResidualMap, MapQuality)],
    readout: Readout,
    choice: LayerChoice<'_>,
) -> anyhow::Result<(SteeringVector, Option<&'a ResidualMap>)> {
    let vector_at = |layers: &LayerStack| {
        stacked(&file.vectors, layers).with_context(|| {
            let known: Vec<_> = file.vectors.iter().map(|vector| vector.layer.to_string()).collect();
            format!("there is no vector of layer {layers}; there are {}", known.join(", "))
        })
    };
    if maps.is_empty() {
        return match choice {
            LayerChoice::Given(layer) => {
                let layer = layer.parse().map(LayerIndex);
                let layer = layer.context("without a mapping `--layer` is one layer, as `10`")?;
                Ok((vector_at(&layer.into())?, None))
            }
            LayerChoice::Best | LayerChoice::Separating { .. } => match file.vectors.as_slice() {
                [only] => Ok((only.clone(), None)),
                several => {
                    let best = best_layer(several).with_context(|| {
                        format!("there are vectors of {} layers: choose one with `--layer`", several.len())
                    })?;
                    eprintln!("chose layer {best}, whose vector tells held-out prompts apart best");
                    Ok((vector_at(&best.into())?, None))
                }
            },
        };
    }
    // Best first, by held-out variance explained.
    let mut pairs: Vec<_> = maps.iter().collect();
    pairs.sort_by(|a, b| a.1.fraction_unexplained().total_cmp(&b.1.fraction_unexplained()));
    pairs.retain(|(map, _)| vector_at(&map.source_layer()).is_ok());
    ensure!(!pairs.is_empty(), "the mapping has no pair from a layer that there is a vector of");
    let maps: Vec<&ResidualMap> = pairs.iter().map(|(map, _)| map).collect();
    let map = match choice {
        LayerChoice::Best => maps[0],
        LayerChoice::Given(pair) => {
            let wanted = pair.split_once(':').and_then(|(s, t)| Some((s.parse::<LayerStack>().ok()?, t.parse().ok()?)));
            let (source, to) = wanted.context("with a mapping `--layer` is a pair of layers, as `24:10`")?;
            let found = maps.iter().find(|map| map.source_layer() == source && map.target_layer() == LayerIndex(to));
            found.copied().with_context(|| {
                let known: Vec<_> =
                    maps.iter().map(|map| format!("{}:{}", map.source_layer(), map.target_layer())).collect();
                format!("the mapping has no pair {pair}; it has {}", known.join(", "))
            })?
        }
        LayerChoice::Separating { sets, source, lora, load } => {
            let source = source_of(file, source, lora, load)?;
            let separations = {
                let bar = Bar::new("choosing layers");
                let step = &mut |done, total| bar.at(done, total);
                learn::separation_by_map(&source, target, &file.vectors, &maps, readout, &sets, step)?
            };
            let mut rated: Vec<_> = maps.iter().zip(separations).filter_map(|(map, auc)| Some((*map, auc?))).collect();
            rated.sort_by(|a, b| b.1.total_cmp(&a.1));
            let row = |(map, auc): &(&ResidualMap, f64)| {
                [format!("{} → {}", map.source_layer(), map.target_layer()), format!("{auc:.3}")]
            };
            eprintln!("{}", table(["layers", "AUC, held out"], rated.iter().map(row)));
            let (map, auc) = *rated.first().context("no pair could be rated")?;
            eprintln!(
                "chose layers {}:{} of {} pairs (AUC {auc:.3} on held-out prompts)",
                map.source_layer(),
                map.target_layer(),
                maps.len()
            );
            map
        }
    };
    Ok((vector_at(&map.source_layer())?, Some(map)))
}
