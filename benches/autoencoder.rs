//! An epoch of an autoencoder's training, beside PyTorch's: `cargo bench --profile dev --bench autoencoder -- PYTHON [PAIRS [ROWS [BATCH]]]`,
//! where PYTHON has torch (`benches/peers/torch_autoencoder.py` says how to install it). Both train on rows of the same shape on all cores, and
//! epochs take turns. Without PYTHON ours is timed alone.

use pilotfish::learn::{AutoencoderOptions, AutoencoderTrainer, PairedRows};
use pilotfish::tensor::Residual;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Instant;

/// Those of SmolLM2-135M and Gemma-3-270M.
const WIDTHS: (usize, usize) = (576, 640);

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let python = arguments.next();
    let mut number = |default| arguments.next().map_or(Ok(default), |argument| argument.parse::<usize>());
    let (pairs, rows, batch_size) = (number(9)?, number(15_000)?, number(AutoencoderOptions::default().batch_size)?);

    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut random =
        |width: usize| -> Vec<f32> { (0..rows * 5 / 4 * width).map(|_| rng.random_range(-1.7..1.7)).collect() };
    let (source, target) = (random(WIDTHS.0), random(WIDTHS.1));
    // A fifth of the documents is held out, so that the training rows are as many as were asked for.
    let documents: Vec<u32> = (0..(rows * 5 / 4) as u32).map(|row| row % 100).collect();
    let data = PairedRows {
        source: Residual::new(&source, WIDTHS.0)?,
        target: Residual::new(&target, WIDTHS.1)?,
        documents: &documents,
    };
    let options = AutoencoderOptions { batch_size, epochs: usize::MAX, patience: usize::MAX, ..Default::default() };
    let mut trainer = AutoencoderTrainer::new(data, options)?;
    let mut ours = move || -> Result<f64, Box<dyn Error>> {
        let start = Instant::now();
        trainer.epoch()?;
        Ok(start.elapsed().as_secs_f64())
    };
    let mut peer = python.map(|python| Peer::start(&python, rows, batch_size)).transpose()?;
    ours()?;
    peer.as_mut().map_or(Ok(0.0), Peer::epoch)?;

    let (mut own, mut theirs) = (Vec::new(), Vec::new());
    for pair in 0..pairs {
        let mut steps = [0, 1];
        steps.rotate_left(pair % 2);
        for step in steps {
            match &mut peer {
                _ if step == 0 => own.push(ours()?),
                Some(peer) => theirs.push(peer.epoch()?),
                None => {}
            }
        }
    }
    println!("{rows} rows of {} to {}, batches of {batch_size}, {pairs} epochs each", WIDTHS.0, WIDTHS.1);
    println!("candle: {:.3} s an epoch, held-out loss and all ({})", median(&mut own), spread(&own));
    if !theirs.is_empty() {
        println!("PyTorch: {:.3} s an epoch ({})", median(&mut theirs), spread(&theirs));
        println!("ratio of medians: {:.3}", median(&mut own) / median(&mut theirs));
    }
    Ok(())
}

/// A Python that trains an epoch for every line that it is sent, and answers with the seconds.
struct Peer {
    process: Child,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    fn start(python: &str, rows: usize, batch_size: usize) -> Result<Self, Box<dyn Error>> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/torch_autoencoder.py");
        let mut process = Command::new(python)
            .arg(script)
            .args([rows, WIDTHS.0, WIDTHS.1, batch_size].map(|number| number.to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let answers = BufReader::new(process.stdout.take().ok_or("no output to read")?);
        Ok(Self { process, answers })
    }

    fn epoch(&mut self) -> Result<f64, Box<dyn Error>> {
        writeln!(self.process.stdin.as_mut().ok_or("no input to write")?)?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        Ok(line.trim().parse().map_err(|_| format!("expected seconds of PyTorch, found `{}`", line.trim()))?)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // At the end of its input it ends.
        drop(self.process.stdin.take());
        if let Err(error) = self.process.wait() {
            eprintln!("waiting for PyTorch: {error}");
        }
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Of sorted values.
fn spread(values: &[f64]) -> String {
    format!("{:.3} – {:.3}", values[0], values[values.len() - 1])
}
