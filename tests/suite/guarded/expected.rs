//! What guarded runs must give. Of a tiny model the whole forward pass is known in `f64`. Of any model, what a patch must make of a row that
//! the model gave it: the same run without that hook point's patches tells the row, and the interventions in `f64` the rest.

use super::*;
use pilotfish::engine::tokens_spelling;
use pilotfish::guard::Intervention;

/// Residuals of the tests' layers, `[layer][n_tokens][n_embd]`, and the logits of every token.
pub(super) type Captured = (Vec<Vec<Vec<f32>>>, Vec<Vec<f32>>);

/// Rows of residuals by sequence, the tests' layer and position.
pub(super) type Rows = BTreeMap<(SequenceId, u32, usize), Vec<f32>>;

/// How far a row that is patched may be from what its interventions make of it, as a fraction of its norm: up to 3.7e-7 was seen after a `switch`, and
/// 1.5e-7 after anything else, on both real models.
const TOLERANCE_OF_PATCHES: f64 = 2e-6;

/// Checks every row of a run at `layers` against what `patched` makes of the same row, by sequence, layer and position, as it was before. `run`
/// gives the rows of a run in which nothing acts at a layer or after it, [`LAYERS`] leaving out nothing.
///
/// The two runs have batches of the same shapes, and so the same bits up to that layer.
pub(super) fn assert_patched(
    what: &str,
    layers: &[u32],
    run: impl Fn(u32) -> Rows,
    mut patched: impl FnMut(SequenceId, u32, usize, &mut [f64]),
) {
    let after = run(LAYERS);
    for layer in layers {
        let before = run(*layer);
        assert!(before.keys().eq(after.keys()) && before.keys().any(|key| key.1 == *layer), "{what}");
        for ((key, before), after) in before.iter().zip(after.values()) {
            let (sequence, at, position) = *key;
            let what = format!("{what}, sequence {sequence}, layer {at}, position {position}");
            if at < *layer {
                assert!(before == after, "{what}: not the same before layer {layer}");
            } else if at == *layer {
                let mut row = widened(before);
                patched(sequence, at, position, &mut row);
                let distance = distance(after, &row);
                assert!(distance <= TOLERANCE_OF_PATCHES, "{what}: off by {distance:.1e} of the norm");
            }
        }
    }
}

/// How far logits of a quantized model may be from those of a batch of another shape, as a fraction of their norm. A sum that another kernel rounds
/// otherwise may round to another eight bits before the next product, and later layers make much of that: up to 0.023 was seen (SmolLM2 and Gemma,
/// on AVX-512 with AMX). Whether each patch acts, and on its own row, is for [`assert_patched`] to tell.
const TOLERANCE_OF_KERNELS: f64 = 0.1;

/// What a script must give, as far as that is known.
pub(super) struct Expected {
    /// `[n_tokens][n_embd]`
    pub residuals: BTreeMap<u32, Vec<Vec<f64>>>,
    /// `[n_tokens][n_vocab]`
    pub logits: Option<Vec<Vec<f64>>>,
    tolerance: f64,
}

impl Expected {
    pub fn assert_is(&self, what: &str, (residuals, logits): &Captured) {
        for (layer, expected) in &self.residuals {
            assert_rows_agree(&format!("{what}: layer {layer}"), &residuals[*layer as usize], expected, self.tolerance);
        }
        if let Some(expected) = &self.logits {
            assert_rows_agree(&format!("{what}: logits"), logits, expected, self.tolerance);
        }
    }
}

fn assert_rows_agree(what: &str, found: &[Vec<f32>], expected: &[Vec<f64>], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (position, (found, expected)) in found.iter().zip(expected).enumerate() {
        let distance = distance(found, expected);
        assert!(distance <= tolerance, "{what}, position {position}: off by {distance:.1e} of the norm");
    }
}

impl Subject {
    /// `guard` with nothing that acts at `layer` or after it.
    pub fn before(&self, guard: &Guard, layer: u32) -> Guard {
        let is_late = |guard: &Guard, entry: &Intervention| {
            layer < LAYERS && guard.layer_of(entry) >= self.layer(layer) && entry.strength != 0.0
        };
        let late = guard.interventions().iter().filter(|entry| is_late(guard, entry));
        late.fold(guard.clone(), |early, entry| early.with_strength(&entry.name, 0.0).unwrap())
    }

    /// What `tokens` spell.
    pub fn text_of(&self, tokens: &[LlamaToken]) -> String {
        let vocab = self.model.llama().vocab();
        let bytes = tokens.iter().flat_map(|token| vocab.token_to_piece(*token, true, None));
        String::from_utf8(bytes.collect()).unwrap()
    }

    /// Indices of the tokens of a prompt that spell `text`.
    pub fn spelling(&self, prompt: &[LlamaToken], text: &str) -> Vec<usize> {
        tokens_spelling(self.model.llama(), prompt, text)
    }

    /// How far logits may be from those of a batch of another shape.
    pub fn tolerance(&self) -> f64 {
        if self.is_quantized() { TOLERANCE_OF_KERNELS } else { TOLERANCE }
    }

    /// Makes `context` capture the tests' layers.
    pub fn capture(&self, context: &mut GuardedContext) {
        context.capture((0..LAYERS).map(|layer| self.layer(layer)));
    }

    /// The rows that `context` has captured since the last call, of the tests' layers.
    pub fn rows(&self, context: &mut GuardedContext) -> Rows {
        let layer = |of_model| (0..LAYERS).find(|layer| self.layer(*layer) == of_model).unwrap();
        let mut rows = Rows::new();
        for captured in context.take_captured() {
            for (row, values) in captured.each() {
                let key = (row.sequence.unwrap(), layer(captured.layer), row.position.0 as usize);
                rows.insert(key, values.to_vec());
            }
        }
        rows
    }

    /// Of the tests' layers, those at which any of `guards` acts.
    pub fn layers_of<'g>(&self, guards: impl IntoIterator<Item = &'g Guard> + Clone) -> Vec<u32> {
        let acts = |layer: &u32| {
            let of = |guard: &&Guard| {
                let mut all = guard.interventions().iter();
                all.any(|entry| guard.layer_of(entry) == self.layer(*layer) && entry.strength != 0.0)
            };
            guards.clone().into_iter().any(|guard| of(&guard))
        };
        (0..LAYERS).filter(acts).collect()
    }

    /// What `script` gives with no guard.
    pub fn unguarded(&self, script: &Script) -> Trace {
        if let Some(tiny) = self.known() {
            return ReferenceModel::new(tiny).run(&script.tokens(), |_, _, _| ());
        }
        let widened = |rows: Vec<Vec<f32>>| rows.iter().map(|row| widened(row)).collect();
        let (residuals, logits) = script.run_captured(self, &mut self.observed());
        Trace { residuals: residuals.into_iter().map(widened).collect(), logits: widened(logits) }
    }

    /// What `script` must give under `guards`, where `open` tells which gates of a guard are open at a layer for a position.
    pub fn expected(
        &self,
        guards: &[&Guard],
        script: &Script,
        open: impl Fn(&Guard, u32, usize) -> Vec<bool>,
    ) -> Expected {
        let apply = |layer: u32, position: usize, row: &mut [f64]| {
            for guard in guards {
                let (at, kind) = (TokenPosition(position as i32), script.kind(position));
                let spells = |text: &str| self.spelling(&script.prompt, text).contains(&position);
                reference::apply(guard, self.layer(layer), at, kind, &open(guard, layer, position), &spells, row);
            }
        };
        if let Some(tiny) = self.known() {
            let trace = ReferenceModel::new(tiny).run(&script.tokens(), apply);
            let residuals = (0..).zip(trace.residuals).collect();
            return Expected { residuals, logits: Some(trace.logits), tolerance: TOLERANCE };
        }
        let of_layer = |layer: u32| {
            let early: Vec<Guard> = guards.iter().map(|guard| self.before(guard, layer)).collect();
            let mut context = self.stacked(&early.iter().collect::<Vec<_>>(), params());
            let (mut residuals, _) = script.run_captured(self, &mut context);
            let rows = residuals.swap_remove(layer as usize).into_iter().enumerate().map(|(position, row)| {
                let mut row = widened(&row);
                apply(layer, position, &mut row);
                row
            });
            (layer, rows.collect())
        };
        let residuals = self.layers_of(guards.iter().copied()).into_iter().map(of_layer).collect();
        Expected { residuals, logits: None, tolerance: TOLERANCE_OF_PATCHES }
    }
}
