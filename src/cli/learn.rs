use super::args::{
    CalibrateArguments, ExtractArguments, LayerPairs, Layers, MapArguments, MappingKindArgument, Method, RankArgument,
    TokensArgument,
};
use super::models::{load, load_named};
use super::progress::Bar;
use super::table::table;
use super::{Outcome, guard, prompts};
use anyhow::{Context, ensure};
use pilotfish::engine::Model;
use pilotfish::guard::{MAPPING_SUFFIX, MappingFile, VectorFile, edit, replace_manifest};
use pilotfish::learn::{
    self, Classes, ContrastMethod, ContrastOptions, CorpusOptions, MapOptions, RankBy, SurveyedPair,
};
use pilotfish::mapping::RidgeOptions;
use pilotfish::steering::PromptTokens;
use pilotfish::tensor::LayerIndex;
use std::io::Write;
use std::path::Path;

pub fn extract(arguments: ExtractArguments) -> anyhow::Result<Outcome> {
    let method = match arguments.method {
        Method::Mean => ContrastMethod::DifferenceOfMeans,
        Method::Lda => ContrastMethod::LinearDiscriminant { shrinkage: arguments.shrinkage },
    };
    let tokens = match arguments.tokens {
        TokensArgument::Last => PromptTokens::Last,
        TokensArgument::Mean => PromptTokens::Mean,
    };
    let positive = prompts::read(&arguments.positive)?;
    let negative = prompts::read(&arguments.negative)?;
    let model = load(&arguments.model)?;
    let layers = match arguments.layers {
        // At the last layer llama.cpp keeps only rows with logits.
        Layers::Auto => {
            let without = u32::from(tokens == PromptTokens::Mean);
            (0..model.shape().n_layer.saturating_sub(without)).map(LayerIndex).collect()
        }
        Layers::Chosen(layers) => layers,
    };
    let found = {
        let bar = Bar::new("reading prompts");
        let step = &mut |done, total| bar.at(done, total);
        let options = ContrastOptions { method, tokens };
        let classes = Classes { positive: &positive, negative: &negative };
        learn::contrast(&model, &layers, &arguments.name, classes, options, step)?
    };
    let file = VectorFile { model: model.identity().clone(), vectors: found.vectors.clone() };
    write(&arguments.output, &file.to_bytes()?)?;
    eprintln!("wrote {} vectors to {}", file.vectors.len(), arguments.output.display());
    let rows = found.vectors.iter().zip(&found.separation).map(|(vector, (layer, separation))| {
        [
            layer.to_string(),
            format!("{separation:.3}"),
            format!("{:.3e}", pilotfish::tensor::norm(&vector.values)),
            format!("{:.2}", vector.mean_norm),
        ]
    });
    let header = ["layer", "AUC, held out", "norm of the vector", "mean norm of the residual"];
    writeln!(std::io::stdout().lock(), "{}", table(header, rows))?;
    Ok(Outcome::Done)
}

pub fn map(arguments: MapArguments) -> anyhow::Result<Outcome> {
    let MappingKindArgument::Affine = arguments.kind;
    let source = load_named(&arguments.source, &arguments.load)?;
    let target = load_named(&arguments.target, &arguments.load)?;
    let sampled = CorpusOptions { documents: arguments.documents, seed: arguments.seed, ..Default::default() };
    let corpus = corpus_of(&source, &arguments.corpus, sampled)?;
    let layers = match arguments.layers {
        LayerPairs::Auto => MapOptions::candidates(source.shape().n_layer, target.shape().n_layer),
        LayerPairs::All => MapOptions::all(source.shape().n_layer, target.shape().n_layer),
        LayerPairs::Chosen(pairs) => pairs,
    };
    let options = MapOptions {
        keep: arguments.keep,
        layers,
        rank_by: match arguments.rank_by {
            RankArgument::Unexplained => RankBy::Unexplained,
            RankArgument::Canonical => RankBy::Canonical,
        },
        rank: arguments.rank,
        ridge: RidgeOptions { seed: u64::from(arguments.seed), cross_validate: true, ..Default::default() },
    };
    ensure!(
        arguments.output.to_string_lossy().ends_with(MAPPING_SUFFIX),
        "`{}`: a mapping's file name ends in `{MAPPING_SUFFIX}`, so that guards can find it",
        arguments.output.display()
    );
    let mapped = {
        let bar = Bar::new("reading and fitting");
        learn::map(&source, &target, &corpus.documents, &options, &mut |done, total| bar.at(done, total))?
    };
    let file = MappingFile {
        source: source.identity().clone(),
        target: target.identity().clone(),
        corpus: corpus.provenance,
        seed: options.ridge.seed,
        pairs: mapped.maps.clone(),
        autoencoders: Vec::new(),
    };
    write(&arguments.output, &file.to_bytes()?)?;
    eprintln!("wrote {} layer pairs to {}", mapped.maps.len(), arguments.output.display());
    if let Some(path) = &arguments.survey {
        write(path, &serde_json::to_vec_pretty(&mapped.survey)?)?;
    }
    let rows = mapped.maps.iter().map(|(map, quality)| {
        let surveyed = mapped.survey.pair(map.source_layer(), map.target_layer());
        let surveyed =
            |figure: fn(&SurveyedPair) -> f64| surveyed.map_or_else(String::new, |pair| format!("{:.3}", figure(pair)));
        [
            format!("{} → {}", map.source_layer(), map.target_layer()),
            format!("{:.3}", quality.fraction_unexplained),
            surveyed(|pair| pair.cross_validated),
            format!("{:.3}", quality.cosine),
            surveyed(|pair| pair.cca),
            quality.backward.map_or_else(String::new, |fit| format!("{:.3}", fit.fraction_unexplained)),
            format!("{:.1e}", quality.lambda),
        ]
    });
    if let Some(rank) = arguments.rank {
        for (map, quality) in &mapped.maps {
            let full = mapped.survey.pair(map.source_layer(), map.target_layer());
            let full = full.map_or(f64::NAN, |pair| pair.fraction_unexplained);
            let (pair, low) =
                (format!("{} → {}", map.source_layer(), map.target_layer()), quality.fraction_unexplained);
            eprintln!("{pair}: {low:.3} of the variance unexplained at rank {rank}, {full:.3} at full rank");
        }
    }
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{}",
        table(
            [
                "layers",
                "variance unexplained, held out",
                "in cross-validation",
                "cosine",
                "canonical correlation²",
                "unexplained backwards",
                "λ / token"
            ],
            rows
        )
    )?;
    writeln!(
        out,
        "{} paired tokens of {} documents; {} layer pairs surveyed",
        mapped.survey.n_tokens,
        mapped.survey.n_documents,
        mapped.survey.pairs.len()
    )?;
    Ok(Outcome::Done)
}

/// What both models read, and where it is from.
struct Corpus {
    documents: Vec<String>,
    provenance: String,
}

/// Reads the files and samples from `source` where one is called `self`.
fn corpus_of(source: &Model, parts: &[String], sampled: CorpusOptions) -> anyhow::Result<Corpus> {
    let (mut documents, mut provenance) = (Vec::new(), Vec::new());
    for part in parts {
        let (texts, from) = if part == "self" {
            let bar = Bar::new("sampling the corpus");
            let texts = learn::sample_corpus(source, sampled, &mut |done, total| bar.at(done, total))?;
            (texts, format!("that {} wrote (seed {})", source.identity().name, sampled.seed))
        } else {
            let path = Path::new(part);
            let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
            (prompts::read(path)?, format!("of {name}"))
        };
        provenance.push(format!("{} documents {from}", texts.len()));
        documents.extend(texts);
    }
    Ok(Corpus { documents, provenance: provenance.join(", ") })
}

pub fn calibrate(arguments: CalibrateArguments) -> anyhow::Result<Outcome> {
    let rate = arguments.false_positive_rate;
    ensure!((0.0..1.0).contains(&rate), "`--false-positive-rate` is a share from 0 to below 1, found {rate}");
    let benign = prompts::read(&arguments.benign)?;
    let model = load(&arguments.model)?;
    let directory = arguments.guard.as_path();
    let guard = guard::load_guard(directory)?;
    let calibrated = {
        let bar = Bar::new("scoring benign prompts");
        learn::calibrate(&model, &guard, &benign, 1.0 - rate, &mut |done, total| bar.at(done, total))?
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
        learn::benign_means(&model, &guard, &benign, &mut |done, total| bar.at(done, total))?
    };
    for (intervention, mean) in means {
        text = edit::set_ablate_mean(&text, &intervention, mean)?;
        eprintln!("intervention `{intervention}`: recentred on the benign projection {mean:.3}");
    }
    replace_manifest(directory, &text)?;
    Ok(Outcome::Done)
}

/// Writes beside `path` and renames, so that nobody ever sees half a file.
fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
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
