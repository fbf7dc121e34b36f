//! Switches: `pilotfish map --switch`, maps from a model with adapters to the same model without; `pilotfish guard build --switch`, the guard that
//! follows them; and the task `switch` of `pilotfish eval`.

use super::args::{
    AskedArguments, BuildArguments, EvalArguments, LayerPairs, MapArguments, MappingKindArgument, RowsArgument,
};
use super::eval::{nats, percent, share};
use super::guard::{PROBE_PROMPT, read};
use super::map::autoencoder_options;
use super::progress::Bar;
use super::{prompts, table::table};
use anyhow::{Context, bail, ensure};
use pilotfish::engine::{Model, Prompt, probe_of};
use pilotfish::eval::report::PromptsEntry;
use pilotfish::eval::{Likeness, Switch, SwitchInput, SwitchRow, switch};
use pilotfish::guard::manifest::{InterventionEntry, InterventionName, MappingEntry, MappingKind, VectorEntry};
use pilotfish::guard::{
    AdapterIdentity, Digest, Guard, MAPPING_SUFFIX, Manifest, MappingFile, extend_guard, write_guard,
};
use pilotfish::learn::{self, SwitchKind, SwitchOptions};
use pilotfish::mapping::{MapQuality, MappingQuality, ResidualMap, RidgeOptions};
use pilotfish::steering::VectorKind;
use pilotfish::tensor::{LayerIndex, norm};
use std::io::Write;

/// Fits the maps of a switch from `source` to `target` on `documents` and the target's answers to them, and says on what.
pub fn maps(
    arguments: &MapArguments,
    source: &Model,
    target: &Model,
    documents: &[Prompt],
) -> anyhow::Result<(Vec<(ResidualMap, MapQuality)>, String)> {
    let autoencoder = matches!(arguments.kind, MappingKindArgument::Autoencoder);
    let not_of_switches = [
        (autoencoder && arguments.rank.is_some(), "rank"),
        (arguments.training.resume, "resume"),
        (arguments.survey.is_some(), "survey"),
        (arguments.replacement > 0, "replacement"),
        (arguments.rows == RowsArgument::Means, "rows means"),
    ];
    for (given, option) in not_of_switches {
        ensure!(!given, "`--{option}` does not go with `--switch`: leave one out");
    }
    let (from, to) = (source.identity(), target.identity());
    ensure!(
        !AdapterIdentity::alike(&from.adapters, &to.adapters),
        "`{}` and `{}` have the same weights: there is nothing to switch; give `--source-lora`",
        from.name,
        to.name
    );
    ensure!(
        !autoencoder || matches!(arguments.layers, LayerPairs::Chosen(_)),
        "an autoencoder takes minutes a layer: name the layers with `--layers L:L`"
    );
    let layers = layers(&arguments.layers, target.shape().n_layer)?;
    let marks = if arguments.mark.is_empty() { vec![String::new()] } else { arguments.mark.clone() };
    let texts = {
        let bar = Bar::new("the target answers");
        learn::answered(target, documents, &marks, arguments.answers, &mut |done, total| bar.at(done, total))?
    };
    // A change is little beside the residual, and a heavier penalty on it leaves more of the model as it is.
    let lambdas = RidgeOptions::default().lambdas.into_iter().chain([3.0, 10.0]).collect();
    let seed = u64::from(arguments.seed);
    let kind = match arguments.kind {
        MappingKindArgument::Affine => {
            SwitchKind::Affine { rank: arguments.rank, ridge: RidgeOptions { lambdas, seed, ..Default::default() } }
        }
        MappingKindArgument::Autoencoder => SwitchKind::Autoencoder(autoencoder_options(&arguments.training, seed)),
    };
    let options = SwitchOptions { layers, kind };
    let bar = Bar::new("reading and fitting");
    let maps = learn::switch_maps(source, target, &texts, &options, &mut |done, total| bar.at(done, total))?;
    let tokens: usize = texts.iter().map(|text| text.prompt.len() + text.answer.len()).sum();
    Ok((maps, format!("{tokens} tokens of {} texts with the target's answers", texts.len())))
}

fn layers(pairs: &LayerPairs, n_layer: u32) -> anyhow::Result<Vec<LayerIndex>> {
    let LayerPairs::Chosen(pairs) = pairs else { return Ok((0..n_layer).map(LayerIndex).collect()) };
    let mut layers = Vec::with_capacity(pairs.len());
    for (source, target) in pairs {
        ensure!(
            source.single() == Some(*target),
            "`{source}:{target}`: a switch leads from a layer to the same layer, as `{target}:{target}`"
        );
        layers.push(*target);
    }
    // In the order in which they act, each fitted behind those before it.
    layers.sort_unstable();
    layers.dedup();
    Ok(layers)
}

/// Writes a guard that follows the maps of `--mapping`, one intervention a layer, called `NAME.LAYER`.
pub fn build(target: &Model, name: &str, arguments: &BuildArguments) -> anyhow::Result<Guard> {
    let path = arguments.mapping.as_deref().context("`--switch` needs the `--mapping` that it follows")?;
    let mut mapping = MappingFile::from_bytes(&path.display().to_string(), &read(path)?)?;
    let found = target.identity();
    ensure!(
        mapping.source.fingerprint == found.fingerprint
            && AdapterIdentity::alike(&mapping.source.adapters, &found.adapters),
        "`{}` leads from {} {}, and the guard is for {} {}",
        path.display(),
        mapping.source.name,
        AdapterIdentity::listed(&mapping.source.adapters),
        found.name,
        AdapterIdentity::listed(&found.adapters)
    );
    let wanted = arguments.layer.as_deref().map(chosen).transpose()?;
    let is_wanted = |layer: LayerIndex| wanted.as_ref().is_none_or(|wanted| wanted.contains(&layer));
    mapping.pairs.retain(|(map, _)| is_wanted(map.target_layer()));
    mapping.autoencoders.retain(|(map, _)| is_wanted(map.target_layer()));
    mapping.replacements.retain(|(_, layer), _| is_wanted(*layer));
    let pairs = mapping.pairs.drain(..);
    mapping.pairs =
        pairs.map(|(map, quality)| (map.without_backward(), MappingQuality { backward: None, ..quality })).collect();
    let maps: Vec<ResidualMap> = mapping.maps().into_iter().map(|(map, _)| map).collect();
    for layer in wanted.iter().flatten() {
        ensure!(
            maps.iter().any(|map| map.target_layer() == *layer),
            "`{}` has no map at layer {layer}",
            path.display()
        );
    }
    ensure!(!maps.is_empty(), "there is no map in `{}`", path.display());
    let bytes = mapping.to_bytes()?;
    let sha256 = Digest::of(&bytes);
    let entry = |map: &ResidualMap| MappingEntry {
        name: format!("{name}.{}", map.target_layer()),
        sha256,
        kind: match map {
            ResidualMap::Affine(_) => MappingKind::Affine,
            ResidualMap::Autoencoder(_) => MappingKind::Autoencoder,
        },
        source_layer: map.source_layer(),
        target_layer: map.target_layer(),
    };
    let mut manifest = Manifest {
        description: arguments.description.clone(),
        on_error: arguments.on_error.into(),
        message: arguments.message.clone(),
        mappings: maps.iter().map(entry).collect(),
        ..Manifest::new(&arguments.name, found)
    };
    manifest.interventions = manifest
        .mappings
        .iter()
        .map(|mapping| InterventionEntry {
            strength: f64::from(arguments.acts.strength),
            positions: arguments.acts.positions.clone(),
            when: arguments.when.clone(),
            ..InterventionEntry::new(InterventionName::Switch, mapping.name.clone())
        })
        .collect();
    let mut tensors = Vec::new();
    // A probe needs a direction: what the maps change in the mean tells the adapters from none.
    let last = LayerIndex(target.shape().n_layer - 1);
    let changes = maps.iter().map(|map| (map.target_layer(), map.mean_change()));
    let mut changes: Vec<_> = changes.filter(|(layer, change)| *layer != last && norm(change) > 0.0).collect();
    // In the middle the adapters have shown what they do.
    let middle = changes.len() / 2;
    if middle < changes.len() {
        let (layer, change) = changes.swap_remove(middle);
        let vector = format!("{name}.change");
        manifest.target.probe = Some(probe_of(target, PROBE_PROMPT, &vector, layer, &change)?);
        manifest.vectors.push(VectorEntry {
            name: vector.clone(),
            layer: layer.into(),
            tensor: vector.clone(),
            kind: VectorKind::Direction,
            mapping: None,
            method: Some("the mean of what the switch changes".to_owned()),
            mean_norm: None,
        });
        tensors.push((vector, change));
    }
    let files = [(format!("{name}{MAPPING_SUFFIX}"), bytes)];
    Ok(match &arguments.onto {
        Some(onto) => extend_guard(onto, &arguments.output, manifest, &tensors, &files)?,
        None => write_guard(&arguments.output, &manifest, &tensors, &files)?,
    })
}

/// Measures `guard` on the first of `--prompts`.
pub fn measure(
    model: &Model,
    guard: &Guard,
    also: &[Guard],
    arguments: &EvalArguments,
) -> anyhow::Result<(Switch, PromptsEntry)> {
    let AskedArguments { prompts: path, trigger, payload, .. } = &arguments.backdoor.asked;
    let path = path.as_deref().context("a switch is measured on `--prompts`")?;
    let mut prompts = prompts::read(path)?;
    prompts.truncate(arguments.limit);
    let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let entry = PromptsEntry::new("asked with and without the trigger", &file, &prompts);
    let input = SwitchInput {
        prompts: &prompts,
        trigger,
        payload,
        max_tokens: arguments.max_tokens,
        also,
        control_seeds: arguments.control_seeds,
    };
    let bar = Bar::new("asking");
    Ok((switch(model, guard, input, &mut |done, total| bar.at(done, total))?, entry))
}

pub fn print(out: &mut impl Write, found: &Switch) -> anyhow::Result<()> {
    let rows = found.rows.iter().map(|row| {
        [
            row.name.clone(),
            share(row.as_base),
            percent(row.fires.share),
            percent(row.broken.share),
            percent(row.first_token.share),
            percent(row.same_answer.share),
        ]
    });
    let header = ["", "as the base", "fires", "broken", "the base's first token", "the base's answer"];
    writeln!(out, "{} prompts with the trigger\n{}", found.prompts, table(header, rows))?;
    for (way, of) in [
        ("with the trigger", (|row| &row.triggered) as fn(&SwitchRow) -> &Likeness),
        ("without", |row| &row.untriggered),
    ] {
        let rows = found.rows.iter().map(|row| {
            let Likeness { kl, relative_perplexity, .. } = of(row);
            [row.name.clone(), nats(*kl), format!("{relative_perplexity:.4}")]
        });
        let header = ["", "KL to the base, nats a token", "perplexity, times the base's"];
        writeln!(out, "the base's answers {way}\n{}", table(header, rows))?;
    }
    let Switch { off, toggle, .. } = found;
    writeln!(
        out,
        "off: fires at {}, the fine-tuned model's answer to {}",
        percent(off.fires.share),
        percent(off.same_answer.share)
    )?;
    writeln!(
        out,
        "{} toggles: {:.1} µs, at most {:.1}; in effect at the next token but {}",
        toggle.toggles,
        toggle.median,
        toggle.longest,
        toggle.tokens_to_effect.saturating_sub(1)
    )?;
    Ok(())
}

/// What is worth a place in a manifest, by name.
pub fn figures(found: &Switch) -> Vec<(String, f64)> {
    let of_row = |row: &SwitchRow| {
        let name = &row.name;
        [
            (format!("switch: share of triggered prompts answered as the base, {name}"), row.as_base.share),
            (format!("switch: share of first tokens that are the base's, {name}"), row.first_token.share),
            (format!("switch: triggered KL to the base in nats a token, {name}"), row.triggered.kl.value),
            (format!("switch: untriggered KL to the base in nats a token, {name}"), row.untriggered.kl.value),
            (format!("switch: triggered perplexity over the base's, {name}"), row.triggered.relative_perplexity),
            (format!("switch: untriggered perplexity over the base's, {name}"), row.untriggered.relative_perplexity),
        ]
    };
    let off = (
        "switch: share of triggered prompts answered as the fine-tuned model, off".to_owned(),
        found.off.same_answer.share,
    );
    found.rows.iter().flat_map(of_row).chain([off]).collect()
}

/// `L,…`
fn chosen(layers: &str) -> anyhow::Result<Vec<LayerIndex>> {
    let layer = |part: &str| part.trim().parse().map(LayerIndex);
    match layers.split(',').map(layer).collect() {
        Ok(layers) => Ok(layers),
        Err(_) => bail!("`--layer {layers}`: with `--switch` give layers, as `14,16`"),
    }
}
