use super::*;
use crate::tensor::Residual;
use rand::RngExt;

const DOCUMENTS: usize = 40;
const ROWS: usize = 30 * DOCUMENTS;
const SOURCE: usize = 12;
const TARGET: usize = 9;

/// Rows of a target that is a bent function of the source, on scales that differ by thousands.
struct Made {
    source: Vec<f32>,
    target: Vec<f32>,
    documents: Vec<u32>,
}

impl Made {
    fn new() -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        let mix: Vec<f32> = (0..SOURCE * TARGET).map(|_| rng.random_range(-1.0..1.0)).collect();
        let (mut source, mut target) = (Vec::new(), Vec::new());
        for _ in 0..ROWS {
            let x: Vec<f32> = (0..SOURCE).map(|_| rng.random_range(-1.0..1.0)).collect();
            for mix in mix.chunks_exact(SOURCE) {
                let sum: f32 = mix.iter().zip(&x).map(|(mix, x)| mix * x).sum();
                target.push(100.0 + 50.0 * sum.max(-0.2));
            }
            source.extend(x.iter().enumerate().map(|(index, x)| x * if index == 0 { 3000.0 } else { 1.0 }));
        }
        Self { source, target, documents: (0..ROWS).map(|row| (row % DOCUMENTS) as u32).collect() }
    }

    fn rows(&self) -> PairedRows<'_> {
        PairedRows {
            source: Residual::new(&self.source, SOURCE).unwrap(),
            target: Residual::new(&self.target, TARGET).unwrap(),
            documents: &self.documents,
        }
    }
}

fn options() -> AutoencoderOptions {
    AutoencoderOptions { hidden: Some(32), learning_rate: 3e-3, epochs: 8, ..Default::default() }
}

fn trained(mut trainer: AutoencoderTrainer, epochs: usize) -> AutoencoderTrainer {
    while trainer.epochs().len() < epochs && !trainer.is_done() {
        trainer.epoch().unwrap();
    }
    trainer
}

const LAYERS: (LayerIndex, LayerIndex) = (LayerIndex(3), LayerIndex(5));

#[test]
fn what_is_bent_is_learnt_and_the_quality_is_that_of_the_map_as_it_is_run() {
    let made = Made::new();
    let trainer =
        trained(AutoencoderTrainer::new(made.rows(), AutoencoderOptions { epochs: 60, ..options() }).unwrap(), 60);
    let (map, quality) = trainer.finish(LAYERS.0, LAYERS.1).unwrap();
    assert!(quality.fraction_unexplained < 0.02, "{quality:?}");
    assert_eq!((map.source_layer(), map.target_layer(), map.hidden_width()), (LAYERS.0, LAYERS.1, 32));
    assert_eq!((quality.n_train, quality.n_heldout), (ROWS * 4 / 5, ROWS / 5));

    let folds = crate::mapping::Folds::new(&made.documents, 5, false, 0).unwrap();
    let (mut unexplained, mut total) = (0.0, 0.0);
    let Standardized { mean, scale } = &Standardized::of(map.target());
    for row in folds.heldout() {
        let x: Vec<f64> = made.rows().source.row(*row).iter().map(|x| f64::from(*x)).collect();
        for ((found, actual), (mean, scale)) in
            map.apply(&x).iter().zip(made.rows().target.row(*row)).zip(mean.iter().zip(scale))
        {
            unexplained += ((found - f64::from(*actual)) / scale).powi(2);
            total += ((f64::from(*actual) - mean) / scale).powi(2);
        }
    }
    assert!((unexplained / total - quality.fraction_unexplained).abs() < 1e-5);
}

/// In `f64`.
struct Standardized {
    mean: Vec<f64>,
    scale: Vec<f64>,
}

impl Standardized {
    fn of(side: &crate::mapping::Standardization) -> Self {
        let wide = |values: &[f32]| values.iter().map(|value| f64::from(*value)).collect();
        Self { mean: wide(&side.mean), scale: wide(&side.scale) }
    }
}

#[test]
fn a_training_that_was_stopped_goes_on_bit_for_bit() {
    let made = Made::new();
    let new = || AutoencoderTrainer::new(made.rows(), options()).unwrap();
    let whole = trained(new(), 8);
    let half = trained(new(), 3).checkpoint().unwrap();
    assert_eq!(half, trained(new(), 3).checkpoint().unwrap());
    let resumed = AutoencoderTrainer::resume(made.rows(), options(), &half).unwrap();
    assert_eq!(resumed.epochs().len(), 3);
    let resumed = trained(resumed, 8);
    assert_eq!(resumed.epochs(), whole.epochs());
    assert_eq!(resumed.checkpoint().unwrap(), whole.checkpoint().unwrap());
    assert_eq!(resumed.finish(LAYERS.0, LAYERS.1).unwrap(), whole.finish(LAYERS.0, LAYERS.1).unwrap());

    let other = AutoencoderTrainer::new(made.rows(), AutoencoderOptions { seed: 1, ..options() }).unwrap();
    assert_ne!(trained(other, 8).finish(LAYERS.0, LAYERS.1).unwrap(), whole.finish(LAYERS.0, LAYERS.1).unwrap());
}

#[test]
fn a_checkpoint_of_another_training_is_refused() {
    let mut made = Made::new();
    let checkpoint = trained(AutoencoderTrainer::new(made.rows(), options()).unwrap(), 1).checkpoint().unwrap();
    let problem = |made: &Made, options, checkpoint: &[u8]| {
        AutoencoderTrainer::resume(made.rows(), options, checkpoint).err().map(|error| error.to_string())
    };
    let longer = AutoencoderOptions { epochs: 20, patience: 7, ..options() };
    assert_eq!(problem(&made, longer, &checkpoint), None);
    let expected = "the checkpoint is of another training: its options differ; train anew, or with the same options";
    assert_eq!(problem(&made, AutoencoderOptions { seed: 9, ..options() }, &checkpoint).as_deref(), Some(expected));
    for length in [0, 7, checkpoint.len() / 2, checkpoint.len() - 1] {
        let found = problem(&made, options(), &checkpoint[..length]).unwrap();
        assert!(found.starts_with("not a checkpoint of an autoencoder's training: "), "{found}");
    }
    made.target[5] += 1.0;
    let found = problem(&made, options(), &checkpoint).unwrap();
    assert!(found.contains("its rows differ"), "{found}");
}

#[test]
fn training_ends_when_held_out_documents_are_predicted_no_better_and_the_best_weights_are_kept() {
    let mut made = Made::new();
    // Nothing to learn: every epoch after the first ones is overfitting.
    made.target.iter_mut().enumerate().for_each(|(index, value)| *value = (index * 7919 % 1013) as f32);
    let options = AutoencoderOptions { hidden: Some(256), epochs: 500, patience: 2, ..options() };
    let trainer = trained(AutoencoderTrainer::new(made.rows(), options).unwrap(), 500);
    let best = *trainer.best().unwrap();
    assert_eq!(trainer.epochs().len(), best.number + 2);
    assert!(trainer.is_done());
    let (_, quality) = trainer.finish(LAYERS.0, LAYERS.1).unwrap();
    let last = trainer.epochs().last().unwrap();
    assert!(last.heldout_loss > best.heldout_loss);
    // The loss is per value, the fraction over the held-out rows' own variance: nearly the same number.
    assert!((quality.fraction_unexplained / best.heldout_loss - 1.0).abs() < 0.1);
}

#[test]
fn what_can_not_be_trained_is_refused() {
    let mut made = Made::new();
    let problem = |made: &Made, options| AutoencoderTrainer::new(made.rows(), options).err().unwrap().to_string();
    for (options, expected) in [
        (AutoencoderOptions { epochs: 0, ..options() }, "`epochs` is 0, expected 1 or more"),
        (AutoencoderOptions { batch_size: 0, ..options() }, "`batch_size` is 0, expected 1 or more"),
        (AutoencoderOptions { hidden: Some(0), ..options() }, "`hidden` is 0, expected 1 or more"),
        (
            AutoencoderOptions { learning_rate: f64::NAN, ..options() },
            "`learning_rate` is NaN, expected a number above 0",
        ),
        (AutoencoderOptions { weight_decay: -1.0, ..options() }, "`weight_decay` is -1, expected a number, 0 or more"),
        (AutoencoderOptions { folds: 1, ..options() }, "`folds` is 1, expected 2 or more"),
    ] {
        assert_eq!(problem(&made, options), expected);
    }
    let mut diverging =
        AutoencoderTrainer::new(made.rows(), AutoencoderOptions { learning_rate: 1e30, ..options() }).unwrap();
    let error = diverging.epoch().unwrap_err().to_string();
    assert!(error.starts_with("the loss is ") && error.contains("in epoch 1: the training has diverged"), "{error}");
    made.source[SOURCE + 1] = f32::INFINITY;
    let expected = "a row of the source activations has a non-finite value: row 1, index 1 is inf";
    assert_eq!(problem(&made, options()), expected);
    made.documents.pop();
    let expected = "`source` has 1200 rows, expected 1199, one for each of the documents' rows";
    assert_eq!(problem(&made, options()), expected);
}
