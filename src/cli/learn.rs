use super::args::{CalibrateArguments, ExtractArguments, LayerPairs, Layers, MapArguments, MappingKindArgument, Method};
use super::models::{load, load_named};
use super::progress::Bar;
use super::table::table;
use super::{Outcome, guard, prompts};
use anyhow::{Context, ensure};
use pilotfish::engine::Model;
use pilotfish::guard::{MappingFile, VectorFile, edit, replace_manifest};
use pilotfish::learn::{self, Contrast, CorpusOptions, MapOptions, Mapped};
use pilotfish::mapping::RidgeOptions;
use pilotfish::tensor::LayerIndex;
use std::io::Write;
use std::path::Path;

pub fn extract(arguments: ExtractArguments) -> anyhow::Result<Outcome> {
    let Method::Mean = arguments.method;
    let positive = prompts::read(&arguments.positive)?;
    let negative = prompts::read(&arguments.negative)?;
    let model = load(&arguments.model)?;
    let layers = match arguments.layers {
        Layers::Auto => (0..model.shape().n_layer).map(LayerIndex).collect(),
        Layers::Chosen(layers) => layers,
    };
    let found = extract_to(&model, &layers, &arguments.name, &positive, &negative, &arguments.output)?;
    let rows = found.vectors.iter().zip(&found.separation).map(|(vector, (layer, separation))| {
        [
            layer.to_string(),
            format!("{separation:.3}"),
            format!("{:.2}", pilotfish::tensor::norm(&vector.values)),
            format!("{:.2}", vector.mean_norm),
        ]
    });
    let header = ["layer", "AUC, held out", "norm of the vector", "mean norm of the residual"];
    writeln!(std::io::stdout().lock(), "{}", table(header, rows))?;
    Ok(Outcome::Done)
}

pub fn extract_to(
    model: &Model,
    layers: &[LayerIndex],
    name: &str,
    positive: &[String],
    negative: &[String],
    output: &Path,
) -> anyhow::Result<Contrast> {
    let found = {
        let bar = Bar::new("reading prompts");
        learn::contrast(model, layers, name, positive, negative, &mut |done, total| bar.at(done, total))?
    };
    let file = VectorFile { model: model.identity().clone(), vectors: found.vectors.clone() };
    write(output, &file.to_bytes()?)?;
    eprintln!("wrote {} vectors to {}", file.vectors.len(), output.display());
    Ok(found)
}

pub fn map(arguments: MapArguments) -> anyhow::Result<Outcome> {
    let MappingKindArgument::Affine = arguments.kind;
    let source = load_named(&arguments.source, &arguments.load)?;
    let target = load_named(&arguments.target, &arguments.load)?;
    let corpus = match arguments.corpus.as_str() {
        "self" => Corpus::Sampled(CorpusOptions {
            documents: arguments.documents,
            seed: arguments.seed,
            ..Default::default()
        }),
        path => Corpus::File(prompts::read(Path::new(path))?, path.to_owned()),
    };
    let layers = match arguments.layers {
        LayerPairs::Auto => MapOptions::survey_all(source.shape().n_layer, target.shape().n_layer),
        LayerPairs::Chosen(pairs) => pairs,
    };
    let options = MapOptions {
        keep: arguments.keep,
        layers,
        ridge: RidgeOptions { seed: u64::from(arguments.seed), ..Default::default() },
    };
    let mapped = map_to(&source, &target, corpus, &options, &arguments.output)?;
    let rows = mapped.maps.iter().map(|(map, quality)| {
        [
            format!("{} → {}", map.source_layer(), map.target_layer()),
            format!("{:.3}", quality.fraction_unexplained),
            format!("{:.3}", quality.cosine),
            format!("{:.1e}", quality.lambda),
        ]
    });
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", table(["layers", "variance unexplained, held out", "cosine", "λ / token"], rows))?;
    writeln!(
        out,
        "{} paired tokens of {} documents; {} layer pairs surveyed",
        mapped.n_tokens,
        mapped.n_documents,
        mapped.survey.len()
    )?;
    Ok(Outcome::Done)
}

/// What both models read.
pub enum Corpus {
    /// Texts, and where they are from.
    File(Vec<String>, String),
    /// The source model writes them.
    Sampled(CorpusOptions),
}

pub fn map_to(
    source: &Model,
    target: &Model,
    corpus: Corpus,
    options: &MapOptions,
    output: &Path,
) -> anyhow::Result<Mapped> {
    ensure!(
        output.to_string_lossy().ends_with(pilotfish::guard::MAPPING_SUFFIX),
        "a mapping's file name ends in `{}`, so that guards can find it",
        pilotfish::guard::MAPPING_SUFFIX
    );
    let (documents, provenance) = match corpus {
        Corpus::File(documents, path) => {
            let file = Path::new(&path).file_name().map(|name| name.to_string_lossy().into_owned());
            let provenance = format!("{} documents of {}", documents.len(), file.unwrap_or(path));
            (documents, provenance)
        }
        Corpus::Sampled(options) => {
            let bar = Bar::new("sampling the corpus");
            let documents = learn::sample_corpus(source, options, &mut |done, total| bar.at(done, total))?;
            let provenance = format!(
                "{} documents that {} wrote (seed {})",
                options.documents,
                source.identity().name,
                options.seed
            );
            (documents, provenance)
        }
    };
    let mapped = {
        let bar = Bar::new("reading and fitting");
        learn::map(source, target, &documents, options, &mut |done, total| bar.at(done, total))?
    };
    let file = MappingFile {
        source: source.identity().clone(),
        target: target.identity().clone(),
        corpus: provenance,
        seed: options.ridge.seed,
        pairs: mapped.maps.clone(),
    };
    write(output, &file.to_bytes()?)?;
    eprintln!("wrote {} layer pairs to {}", mapped.maps.len(), output.display());
    Ok(mapped)
}

pub fn calibrate(arguments: CalibrateArguments) -> anyhow::Result<Outcome> {
    let rate = arguments.false_positive_rate;
    ensure!((0.0..1.0).contains(&rate), "`--false-positive-rate` is a share from 0 to below 1, found {rate}");
    let benign = prompts::read(&arguments.benign)?;
    let model = load(&arguments.model)?;
    calibrate_in(&model, &arguments.guard, &benign, rate)?;
    Ok(Outcome::Done)
}

/// Calibrates the guard in `directory`, keeping whatever else its manifest says.
pub fn calibrate_in(model: &Model, directory: &Path, benign: &[String], rate: f64) -> anyhow::Result<()> {
    let guard = guard::load_guard(directory)?;
    let calibrated = {
        let bar = Bar::new("scoring benign prompts");
        learn::calibrate(model, &guard, benign, 1.0 - rate, &mut |done, total| bar.at(done, total))?
    };
    let path = directory.join(pilotfish::guard::MANIFEST_FILE);
    let mut text = std::fs::read_to_string(&path).with_context(|| format!("can't read `{}`", path.display()))?;
    for gate in &calibrated {
        text = edit::set_gate_calibration(&text, &gate.gate, gate.mean, gate.deviation, gate.threshold)?;
        eprintln!(
            "gate `{}`: benign projection {:.3} ± {:.3}, fires from {:+.2} deviations on ({:.1} % of {} benign prompts)",
            gate.gate,
            gate.mean,
            gate.deviation,
            gate.threshold,
            100.0 * rate,
            benign.len()
        );
    }
    let means = {
        let bar = Bar::new("reading benign prompts");
        learn::benign_means(model, &guard, benign, &mut |done, total| bar.at(done, total))?
    };
    for (intervention, mean) in means {
        text = edit::set_ablate_mean(&text, &intervention, mean)?;
        eprintln!("intervention `{intervention}`: recentred on the benign projection {mean:.3}");
    }
    replace_manifest(directory, &text)?;
    Ok(())
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
