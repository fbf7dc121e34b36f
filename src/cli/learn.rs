use super::args::{CalibrateArguments, ExtractArguments, Layers, Method};
use super::models::{load, load_named};
use super::progress::Bar;
use super::table::table;
use super::{Outcome, guard, prompts, strength};
use anyhow::{Context, bail, ensure};
use pilotfish::engine::Prompt;
use pilotfish::guard::{
    Gate, GateCalibration, Intervention, InterventionKind, VectorFile, edit, guard_with_manifest, replace_manifest,
};
use pilotfish::learn::{
    self, BenignProjection, Calibrated, CalibrationOptions, Classes, ContrastMethod, ContrastOptions, FirstTokens,
    SweptLayer,
};
use pilotfish::steering::SteeringVector;
use pilotfish::tensor::LayerIndex;
use std::io::Write;
use std::path::Path;

pub fn extract(arguments: ExtractArguments) -> anyhow::Result<Outcome> {
    let method = match arguments.method {
        Method::Mean => ContrastMethod::DifferenceOfMeans,
        Method::Pca => ContrastMethod::PrincipalDifference,
        Method::Lda => ContrastMethod::LinearDiscriminant { shrinkage: arguments.shrinkage },
        Method::Logistic => ContrastMethod::LogisticRegression { penalty: arguments.penalty },
    };
    let contrasts = prompts::read_contrasts(&arguments.positive, &arguments.negative)?;
    let classes: Vec<_> = contrasts.iter().map(prompts::Contrasted::classes).collect();
    let model = load(&arguments.model)?;
    let layers = match arguments.layers {
        // At the last layer llama.cpp keeps only rows with logits.
        Layers::Auto => {
            let without = u32::from(arguments.tokens.need_every_token());
            (0..model.shape().n_layer.saturating_sub(without)).map(LayerIndex).collect()
        }
        Layers::Chosen(layers) => layers,
    };
    let options = ContrastOptions {
        method,
        tokens: arguments.tokens,
        weights: arguments.weights,
        resamples: arguments.resamples,
        seed: arguments.seed,
    };
    let found = {
        let bar = Bar::new("reading prompts");
        learn::contrast(&model, &layers, &arguments.name, &classes, &options, &mut |done, total| bar.at(done, total))?
    };
    let file = VectorFile { model: model.identity().clone(), vectors: found.vectors };
    write(&arguments.output, &file.to_bytes()?)?;
    eprintln!("wrote {} vectors to {}", file.vectors.len(), arguments.output.display());
    writeln!(std::io::stdout().lock(), "{}", qualities(&file.vectors))?;
    if let Some(strength) = arguments.sweep {
        // Of every contrast some.
        let some = |class: fn(&learn::Classes<'_>) -> Vec<Prompt>| -> Vec<Prompt> {
            let each = arguments.sweep_prompts.div_ceil(classes.len());
            classes.iter().flat_map(|classes| class(classes).into_iter().take(each)).collect()
        };
        let positive = some(|classes| classes.positive.to_vec());
        let negative = some(|classes| classes.negative.to_vec());
        let bar = Bar::new("steering with each vector");
        let first_tokens = FirstTokens::new(&model, &arguments.effect_tokens, &positive, &negative)?;
        // At the last layer there is no residual of every token to measure by.
        let last = model.shape().n_layer - 1;
        let inner: Vec<_> = file.vectors.into_iter().filter(|vector| vector.layer.0 < last).collect();
        let measure = |guard: &_| first_tokens.measure(guard);
        let step = &mut |done, total| bar.at(done, total);
        let swept = learn::sweep(&model, &inner, strength, &negative, measure, step)?;
        drop(bar);
        writeln!(std::io::stdout().lock(), "{}", sweep_table(&swept, arguments.sweep_kl))?;
    }
    Ok(Outcome::Done)
}

fn sweep_table(swept: &[SweptLayer], most: f64) -> comfy_table::Table {
    let best = learn::best_of_sweep(swept, most).map(|best| best.layer);
    let rows = swept.iter().map(|layer| {
        let mark = if Some(layer.layer) == best { " *" } else { "" };
        [
            format!("{}{mark}", layer.layer),
            format!("{:+.3}", layer.effect),
            format!("{:.4}", layer.kl),
            format!("{:.3}", layer.deviation),
        ]
    });
    table(["layer (* best)", "effect: change of log-odds", "KL on negative prompts", "deviation"], rows)
}

/// What is known of each vector; the layer that tells held-out prompts apart best is marked.
fn qualities(vectors: &[SteeringVector]) -> comfy_table::Table {
    let best = best_layer(vectors);
    let number = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.3}"));
    let rows = vectors.iter().filter_map(|vector| Some((vector, vector.quality.as_ref()?))).map(|(vector, quality)| {
        let sets: Vec<_> = quality.auc.iter().map(|auc| format!("{auc:.3}")).collect();
        let mark = if Some(vector.layer) == best { " *" } else { "" };
        [
            format!("{}{mark}", vector.layer),
            sets.join(", "),
            number(quality.stability.map(|stability| stability.mean_cosine)),
            number(quality.cosine_before),
            number(quality.cosine_after),
            format!("{:.3e}", quality.norm),
            format!("{:.2}", vector.mean_norm),
        ]
    });
    let header = [
        "layer (* best)",
        "AUC, held out",
        "stability",
        "cosine to the layer before",
        "to the one after",
        "norm of the vector",
        "mean norm of the residual",
    ];
    table(header, rows)
}

/// The layer whose vector has the highest cross-validated AUC; the first of several.
pub fn best_layer(vectors: &[SteeringVector]) -> Option<LayerIndex> {
    let rated = vectors.iter().filter_map(|vector| Some((vector.layer, vector.quality.as_ref()?.mean_auc())));
    rated
        .fold(None, |best: Option<(LayerIndex, f64)>, (layer, auc)| match best {
            Some((_, highest)) if highest >= auc => best,
            _ => Some((layer, auc)),
        })
        .map(|(layer, _)| layer)
}

pub fn calibrate(arguments: CalibrateArguments) -> anyhow::Result<Outcome> {
    let directory = arguments.guard.as_path();
    let path = directory.join(pilotfish::guard::MANIFEST_FILE);
    let text = || std::fs::read_to_string(&path).with_context(|| format!("can't read `{}`", path.display()));
    let guard = guard::load_guard(directory)?;
    if let Some(rate) = arguments.operating_point {
        let guard = guard.at_rate(rate)?;
        replace_manifest(directory, &edit::set_thresholds(&text()?, &guard)?)?;
        eprintln!("guard `{}`: thresholds that let {} of benign prompts fire", guard.name(), percent(rate));
        return Ok(Outcome::Done);
    }
    let rate = arguments.false_positive_rate;
    ensure!((0.0..1.0).contains(&rate), "`--false-positive-rate` is a share from 0 to below 1, found {rate}");
    if let Some(confidence) = arguments.confidence {
        ensure!(
            confidence > 0.0 && confidence < 1.0 && rate > 0.0,
            "`--confidence` is a share between 0 and 1, of a rate above 0; found {confidence} of {rate}"
        );
    }
    if let Some(share) = arguments.refusals {
        ensure!(share > 0.0 && share <= 1.0, "`--refusals` is a share above 0, up to 1; found {share}");
        ensure!(
            !guard.interventions().is_empty(),
            "guard `{}` has no intervention, so there is no strength to look for by `--refusals`",
            guard.name()
        );
    }
    let (Some(name), Some(benign)) = (&arguments.model, &arguments.benign) else {
        bail!("a calibration needs `--model` and `--benign`");
    };
    let asked = |name: &str| arguments.only.is_empty() || arguments.only.iter().any(|only| only == name);
    let parts: Vec<&str> = guard
        .gates()
        .iter()
        .map(|gate| gate.name.as_str())
        .chain(guard.interventions().iter().map(|intervention| intervention.name.as_str()))
        .collect();
    for only in &arguments.only {
        ensure!(
            parts.contains(&only.as_str()),
            "guard `{}` has no gate and no intervention `{only}`; it has {}",
            guard.name(),
            listed(&parts)
        );
    }
    let benign = prompts::read(benign)?;
    let positive = arguments.positive.as_deref().map(prompts::read).transpose()?.unwrap_or_default();
    let model = load_named(name, &arguments.lora, &arguments.load)?;
    guard::warn_of_adapters(&model, [&guard]);
    let calibrated = {
        let bar = Bar::new("scoring prompts");
        let options = CalibrationOptions { false_positive_rate: rate, confidence: arguments.confidence };
        let asked = |gate: &Gate| asked(&gate.name);
        learn::calibrate(&model, &guard, asked, &benign, &positive, options, &mut |done, total| bar.at(done, total))?
    };
    let mut text = text()?;
    for Calibrated { gate, calibration } in &calibrated {
        text = edit::set_gate_calibration(&text, gate, calibration)?;
        eprintln!(
            "gate `{gate}` on {}: benign projection {:.3} ± {:.3}, fires from {:+.2} deviations on",
            calibration.quantization, calibration.mean, calibration.deviation, calibration.threshold
        );
        writeln!(std::io::stdout().lock(), "{}", operating_points(calibration))?;
    }
    let strength = arguments.strength_sd;
    let measured = |intervention: &Intervention| match intervention.kind {
        _ if !asked(&intervention.name) => false,
        InterventionKind::Ablate { .. } => true,
        InterventionKind::Add { .. } => strength.is_some() || intervention.deviation.is_some(),
        _ => false,
    };
    let projections = {
        let bar = Bar::new("reading benign prompts");
        learn::benign_projections(&model, &guard, measured, &benign, &mut |done, total| bar.at(done, total))?
    };
    for only in &arguments.only {
        let is_set =
            calibrated.iter().any(|of| of.gate == *only) || projections.iter().any(|of| of.intervention == *only);
        ensure!(
            is_set,
            "`--only {only}`: there is nothing to measure for it; what is calibrated are gates, each `ablate`, and an `add` in deviations or with \
             `--strength-sd`"
        );
    }
    for BenignProjection { intervention: name, mean, deviation } in projections {
        let intervention = guard.interventions().iter().find(|known| known.name == name).expect("one of the guard's");
        if matches!(intervention.kind, InterventionKind::Ablate { .. }) {
            text = edit::set_ablate_mean(&text, &name, mean)?;
            eprintln!("intervention `{name}`: recentred on the benign projection {mean:.3}");
        } else {
            let strength = strength.unwrap_or(f64::from(intervention.strength));
            text = edit::set_strength_deviation(&text, &name, strength, deviation)?;
            eprintln!("intervention `{name}`: adds {strength} × {deviation:.3}, the deviation of benign projections");
        }
    }
    if let Some(share) = arguments.refusals {
        // With the thresholds just found.
        let guard = guard_with_manifest(directory, &text)?;
        let prompts = Classes { positive: &positive, negative: &benign };
        text = edit::set_strengths(&text, &strength::for_refusals(&model, &guard, share, prompts, &arguments)?)?;
    }
    replace_manifest(directory, &text)?;
    Ok(Outcome::Done)
}

fn operating_points(calibration: &GateCalibration) -> comfy_table::Table {
    let rows = calibration.points.iter().map(|point| {
        let mark = if point.threshold == calibration.threshold { " *" } else { "" };
        [
            format!("{}{mark}", percent(point.rate)),
            format!("{:+.3}", point.threshold),
            format!("{} of {}", point.fired, calibration.n_benign),
            format!("{} to {}", percent(point.low), percent(point.high)),
            point.detection.map_or_else(|| "–".to_owned(), percent),
        ]
    });
    table(
        ["benign that may fire (* in use)", "threshold", "fired", "share of all such, 95 %", "positive that fire"],
        rows,
    )
}

/// `a`, `b` and so on, each in quotes.
fn listed(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

pub fn percent(share: f64) -> String {
    // Without the zeros of a number that needs none.
    let figure = format!("{:.2}", 100.0 * share);
    format!("{} %", figure.trim_end_matches('0').trim_end_matches('.'))
}

/// Writes beside `path` and renames, so that nobody ever sees half a file.
pub fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let written = || -> std::io::Result<()> {
        std::fs::create_dir_all(directory)?;
        let mut file = tempfile::Builder::new().permissions(default_permissions()).tempfile_in(directory)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map(drop).map_err(|error| error.error)
    };
    written().with_context(|| format!("can't write `{}`", path.display()))
}

/// A temporary file is the user's alone; what becomes of it is an ordinary file.
fn default_permissions() -> std::fs::Permissions {
    #[cfg(unix)]
    return std::os::unix::fs::PermissionsExt::from_mode(0o644);
    #[cfg(not(unix))]
    return std::fs::metadata(".").map(|metadata| metadata.permissions()).expect("the current directory");
}
