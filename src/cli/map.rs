//! `pilotfish map`, of either kind.

use super::args::{LayerPairs, MapArguments, MappingKindArgument, RankArgument, RowsArgument, TrainingArguments};
use super::models::load_named;
use super::progress::Bar;
use super::table::table;
use super::{Outcome, learn::write, prompts, switch};
use anyhow::{Context, bail, ensure};
use pilotfish::engine::{Model, Prompt};
use pilotfish::guard::{MAPPING_SUFFIX, MappingFile};
use pilotfish::learn::{
    self, AutoencoderOptions, CorpusOptions, Epoch, LayerPair, MapOptions, MapRows, RankBy, Survey, TrainingWatch,
};
use pilotfish::mapping::{MapQuality, ReplacementQuality, ResidualMap, RidgeOptions};
use pilotfish::tensor::{LayerIndex, LayerStack};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

pub fn map(arguments: MapArguments) -> anyhow::Result<Outcome> {
    let stem = arguments.output.file_name().and_then(|name| name.to_str()?.strip_suffix(MAPPING_SUFFIX));
    let stem = stem.map(|stem| arguments.output.with_file_name(stem)).with_context(|| {
        let output = arguments.output.display();
        format!("`{output}`: a mapping's file name ends in `{MAPPING_SUFFIX}`, so that guards can find it")
    })?;
    let source = load_named(&arguments.source, &arguments.source_lora, &arguments.load)?;
    let target = load_named(&arguments.target, &arguments.target_lora, &arguments.load)?;
    let sampled = CorpusOptions { documents: arguments.documents, seed: arguments.seed, ..Default::default() };
    let corpus = corpus_of(&source, &arguments.corpus, sampled)?;
    let seed = u64::from(arguments.seed);
    let (documents, aside) = learn::set_aside(corpus.documents, arguments.replacement, seed);
    ensure!(
        aside.len() == arguments.replacement,
        "`--replacement {}`: the corpus has {} documents, and some must be left to learn from",
        arguments.replacement,
        documents.len() + aside.len()
    );
    let mut file = MappingFile {
        source: source.identity().clone(),
        target: target.identity().clone(),
        corpus: corpus.provenance,
        seed,
        pairs: Vec::new(),
        autoencoders: Vec::new(),
        replacements: BTreeMap::new(),
    };
    let (survey, found) = match arguments.kind {
        _ if arguments.switch => {
            let (maps, found) = switch::maps(&arguments, &source, &target, &documents)?;
            let layers = maps.len();
            for (map, quality) in maps {
                match (map, quality) {
                    (ResidualMap::Affine(map), MapQuality::Affine(quality)) => file.pairs.push((map, quality)),
                    (ResidualMap::Autoencoder(map), MapQuality::Autoencoder(quality)) => {
                        file.autoencoders.push((map, quality))
                    }
                    _ => unreachable!("a map has a quality of its own kind"),
                }
            }
            write(&arguments.output, &file.to_bytes()?)?;
            eprintln!("wrote {layers} layers to {}", arguments.output.display());
            (None, found)
        }
        MappingKindArgument::Affine => {
            let options = affine_options(&arguments, &source, &target);
            let mapped = {
                let bar = Bar::new("reading and fitting");
                learn::map(&source, &target, &documents, &options, &mut |done, total| bar.at(done, total))?
            };
            file.pairs = mapped.maps;
            write_mapping(&mut file, &arguments.output, (&source, &target), &aside)?;
            if let Some(path) = &arguments.survey {
                write(path, &serde_json::to_vec_pretty(&mapped.survey)?)?;
            }
            let Survey { n_tokens, n_documents, ref pairs, .. } = mapped.survey;
            let what = if arguments.rows == RowsArgument::Means { "means" } else { "tokens" };
            let found =
                format!("{n_tokens} paired {what} of {n_documents} documents; {} layer pairs surveyed", pairs.len());
            (Some(mapped.survey), found)
        }
        MappingKindArgument::Autoencoder => {
            let layers = autoencoder_layers(&arguments)?;
            let options = autoencoder_options(&arguments.training, seed);
            let mut training = Training { stem, resume: arguments.training.resume, bar: Bar::new("reading") };
            let mapped = learn::map_by_autoencoder(&source, &target, &documents, &layers, &options, &mut training)?;
            file.autoencoders = mapped.maps;
            write_mapping(&mut file, &arguments.output, (&source, &target), &aside)?;
            // Only now is there nothing that they would be needed for.
            layers.iter().try_for_each(|pair| training.forget(*pair))?;
            (None, format!("{} paired tokens of {} documents", mapped.n_tokens, mapped.n_documents))
        }
    };
    report(&file, survey.as_ref(), &found)?;
    Ok(Outcome::Done)
}

fn affine_options(arguments: &MapArguments, source: &Model, target: &Model) -> MapOptions {
    let (source_layers, target_layers) = (source.shape().n_layer, target.shape().n_layer);
    MapOptions {
        keep: arguments.keep,
        layers: match &arguments.layers {
            LayerPairs::Auto => MapOptions::candidates(source_layers, target_layers),
            LayerPairs::All => MapOptions::all(source_layers, target_layers),
            LayerPairs::Chosen(pairs) => pairs.clone(),
        },
        rank_by: match arguments.rank_by {
            RankArgument::Unexplained => RankBy::Unexplained,
            RankArgument::Canonical => RankBy::Canonical,
        },
        rank: arguments.rank,
        rows: match arguments.rows {
            RowsArgument::Tokens => MapRows::Tokens,
            RowsArgument::Means => MapRows::Means,
        },
        ridge: RidgeOptions { seed: u64::from(arguments.seed), cross_validate: true, ..Default::default() },
    }
}

/// The pairs of layers to train an autoencoder for each.
fn autoencoder_layers(arguments: &MapArguments) -> anyhow::Result<Vec<LayerPair>> {
    let of_affine = [
        (arguments.rank.is_some(), "rank"),
        (arguments.survey.is_some(), "survey"),
        (arguments.rows == RowsArgument::Means, "rows means"),
    ];
    for (given, option) in of_affine {
        ensure!(!given, "`--{option}` is of affine mappings; leave it out, or take `--kind affine`");
    }
    let LayerPairs::Chosen(layers) = &arguments.layers else {
        bail!(
            "an autoencoder takes minutes a pair of layers: name them with `--layers S:T`; `--kind affine` finds good ones"
        )
    };
    let pair = |(source, target): &(LayerStack, LayerIndex)| {
        let source = source.single().with_context(|| {
            format!("`{source}:{target}`: an autoencoder reads one source layer; `--kind affine` can read several")
        })?;
        Ok((source, *target))
    };
    layers.iter().map(pair).collect()
}

/// Measures what becomes of the target's output on the documents that were set aside, and writes the file.
fn write_mapping(
    file: &mut MappingFile,
    output: &Path,
    (source, target): (&Model, &Model),
    aside: &[Prompt],
) -> anyhow::Result<()> {
    let maps = file.maps();
    if !aside.is_empty() {
        let maps: Vec<&ResidualMap> = maps.iter().map(|(map, _)| map).collect();
        let bar = Bar::new("replacing residuals");
        let measured = learn::replacement(source, target, &maps, aside, &mut |done, total| bar.at(done, total))?;
        let pairs = maps.iter().map(|map| (map.source_layer(), map.target_layer()));
        file.replacements = pairs.zip(measured).collect();
    }
    write(output, &file.to_bytes()?)?;
    eprintln!("wrote {} layer pairs to {}", maps.len(), output.display());
    Ok(())
}

/// The same table for maps of either kind; `survey` is of the affine ones.
fn report(file: &MappingFile, survey: Option<&Survey>, found: &str) -> anyhow::Result<()> {
    let rows = file.maps().into_iter().map(|(map, quality)| {
        let pair = (map.source_layer(), map.target_layer());
        let figure = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.3}"));
        let replaced = |of: fn(&ReplacementQuality) -> f64| figure(file.replacements.get(&pair).map(of));
        let surveyed = survey.and_then(|survey| survey.pair(&pair.0, pair.1));
        let (kind, backward, learnt) = match (&map, quality) {
            (ResidualMap::Autoencoder(map), _) => ("autoencoder", None, format!("{} hidden", map.hidden_width())),
            (ResidualMap::Affine(map), MapQuality::Affine(quality)) => {
                let rank = map.factors().map_or_else(String::new, |factors| format!(", rank {}", factors.rank));
                let backward = quality.backward.map(|fit| fit.fraction_unexplained);
                ("affine", backward, format!("λ {:.1e} a token{rank}", quality.lambda))
            }
            (_, MapQuality::Autoencoder(_)) => unreachable!("a map has a quality of its own kind"),
        };
        [
            format!("{} → {}", pair.0, pair.1),
            kind.to_owned(),
            format!("{:.3}", quality.fraction_unexplained()),
            figure(surveyed.map(|pair| pair.cross_validated)),
            format!("{:.3}", quality.cosine()),
            figure(surveyed.map(|pair| pair.cca)),
            figure(backward),
            replaced(|quality| quality.kl),
            replaced(|quality| quality.kl_mean_ablation),
            learnt,
        ]
    });
    let header = [
        "layers",
        "kind",
        "variance unexplained, held out",
        "in cross-validation",
        "cosine",
        "canonical correlation²",
        "unexplained backwards",
        "KL replaced",
        "KL mean-ablated",
        "",
    ];
    say_what_rank_costs(file, survey);
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", table(header, rows))?;
    if let Some(quality) = file.replacements.values().next() {
        writeln!(
            out,
            "KL in nats a token, over {} tokens of {} documents set aside; {:.0} % of their residuals replaced",
            quality.n_tokens,
            quality.n_documents,
            100.0 * quality.replaced
        )?;
    }
    writeln!(out, "{found}")?;
    Ok(())
}

/// How much worse than at full rank each map of low rank predicts.
fn say_what_rank_costs(file: &MappingFile, survey: Option<&Survey>) {
    for (map, quality) in &file.pairs {
        let full = survey.and_then(|survey| survey.pair(map.source_layer(), map.target_layer()));
        if let (Some(factors), Some(full)) = (map.factors(), full) {
            eprintln!(
                "{} → {}: {:.3} of the variance unexplained at rank {}, {:.3} at full rank",
                map.source_layer(),
                map.target_layer(),
                quality.fraction_unexplained,
                factors.rank,
                full.fraction_unexplained
            );
        }
    }
}

pub fn autoencoder_options(arguments: &TrainingArguments, seed: u64) -> AutoencoderOptions {
    AutoencoderOptions {
        hidden: arguments.hidden,
        learning_rate: arguments.learning_rate,
        weight_decay: arguments.weight_decay,
        batch_size: arguments.batch_size,
        epochs: arguments.epochs,
        patience: arguments.patience,
        seed,
        ..Default::default()
    }
}

/// Keeps checkpoints beside the output, and shows how far training is.
struct Training {
    /// The output without its suffix.
    stem: PathBuf,
    resume: bool,
    bar: Bar,
}

impl Training {
    /// `NAME.S-T.checkpoint.safetensors`: no guard takes it for a mapping.
    fn path(&self, (source, target): LayerPair) -> PathBuf {
        let mut path = self.stem.clone().into_os_string();
        path.push(format!(".{source}-{target}.checkpoint.safetensors"));
        path.into()
    }

    fn forget(&self, pair: LayerPair) -> anyhow::Result<()> {
        let path = self.path(pair);
        std::fs::remove_file(&path).with_context(|| format!("can't remove `{}`", path.display()))
    }
}

impl TrainingWatch for Training {
    fn read(&mut self, done: usize, total: usize) {
        self.bar.at(done, total);
    }

    fn checkpoint(&mut self, pair: LayerPair) -> std::io::Result<Option<Vec<u8>>> {
        self.bar = Bar::new(&format!("training {} → {}", pair.0, pair.1));
        if !self.resume {
            return Ok(None);
        }
        match std::fs::read(self.path(pair)) {
            Ok(bytes) => Ok(Some(bytes)),
            // Another pair's training was stopped.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn epoch(&mut self, pair: LayerPair, epoch: &Epoch, most: usize, checkpoint: &[u8]) -> std::io::Result<()> {
        self.bar.at(epoch.number, most);
        self.bar.say(&format!(
            "layers {} → {}, epoch {}: loss {:.4}, held out {:.4}",
            pair.0, pair.1, epoch.number, epoch.train_loss, epoch.heldout_loss
        ));
        write(&self.path(pair), checkpoint).map_err(std::io::Error::other)
    }
}

/// What both models read, and where it is from.
struct Corpus {
    documents: Vec<Prompt>,
    provenance: String,
}

/// Reads the files and samples from `source` where one is called `self`.
fn corpus_of(source: &Model, parts: &[String], sampled: CorpusOptions) -> anyhow::Result<Corpus> {
    let (mut documents, mut provenance) = (Vec::new(), Vec::new());
    for part in parts {
        let (texts, from) = if part == "self" {
            let bar = Bar::new("sampling the corpus");
            let texts = learn::sample_corpus(source, sampled, &mut |done, total| bar.at(done, total))?;
            (
                texts.into_iter().map(Prompt::from).collect(),
                format!("that {} wrote (seed {})", source.identity().name, sampled.seed),
            )
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
