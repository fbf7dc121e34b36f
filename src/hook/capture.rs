//! Reading residual rows out, and putting others in their place: for learning and measuring, no part of any guard.

use super::table::{Tensor, TensorBytes};
use crate::program::{Row, RowKind};
use crate::tensor::{LayerIndex, Residual, SequenceId, TokenPosition};
use std::collections::BTreeMap;

/// Copies of residual rows, as they were after the program patched them.
#[derive(Debug, Default)]
pub struct Capture {
    which: CaptureRows,
    /// By layer.
    layers: Vec<CapturedLayer>,
    /// What a residual is read to that does not lie in host memory.
    copy: Vec<f32>,
}

/// Which rows a capture is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CaptureRows {
    #[default]
    All,
    /// All but those of position 0, an attention sink.
    AfterFirst,
    /// The last of each prompt.
    PromptEnds,
}

/// Rows of one layer's residual, in the order in which they were computed.
#[derive(Debug, Clone, PartialEq)]
pub struct CapturedLayer {
    pub layer: LayerIndex,
    pub rows: Vec<Row>,
    /// `[rows.len(), width]`
    pub values: Vec<f32>,
}

impl CapturedLayer {
    fn new(layer: LayerIndex) -> Self {
        Self { layer, rows: Vec::new(), values: Vec::new() }
    }

    /// Each row with its values, `[width]`.
    pub fn each(&self) -> impl Iterator<Item = (&Row, &[f32])> {
        let width = self.values.len().checked_div(self.rows.len()).unwrap_or(1);
        self.rows.iter().zip(self.values.chunks_exact(width))
    }
}

impl CaptureRows {
    fn has(self, row: &Row) -> bool {
        match self {
            Self::All => true,
            Self::AfterFirst => !row.position.is_sink(),
            Self::PromptEnds => row.kind == RowKind::PromptEnd,
        }
    }
}

impl Capture {
    pub fn new(layers: impl IntoIterator<Item = LayerIndex>, which: CaptureRows) -> Self {
        let mut layers: Vec<_> = layers.into_iter().collect();
        layers.sort_unstable();
        layers.dedup();
        Self { which, layers: layers.into_iter().map(CapturedLayer::new).collect(), copy: Vec::new() }
    }

    pub(super) fn layers(&self) -> impl Iterator<Item = LayerIndex> {
        self.layers.iter().map(|captured| captured.layer)
    }

    pub(super) fn has(&self, layer: LayerIndex) -> bool {
        self.layers.binary_search_by_key(&layer, |captured| captured.layer).is_ok()
    }

    /// What was captured since the last call.
    pub(super) fn take(&mut self) -> Vec<CapturedLayer> {
        self.layers.iter_mut().map(|captured| std::mem::replace(captured, CapturedLayer::new(captured.layer))).collect()
    }

    /// Copies the wanted ones of `rows`, which `tensor` is the residual of at `layer`.
    ///
    /// # Safety
    /// As of [`Tensor::bytes`].
    pub(super) unsafe fn take_note(&mut self, layer: LayerIndex, rows: &[Row], width: usize, tensor: &mut Tensor<'_>) {
        let Ok(at) = self.layers.binary_search_by_key(&layer, |captured| captured.layer) else { return };
        let captured = &mut self.layers[at];
        let wanted = rows.iter().filter(|row| self.which.has(row)).count();
        if wanted == 0 {
            return;
        }
        // SAFETY: guaranteed by the caller.
        let values: &[f32] = match unsafe { tensor.bytes() } {
            TensorBytes::Host(values) => values,
            TensorBytes::Device => {
                self.copy.resize(tensor.n_elements(), 0.0);
                // SAFETY: as above.
                unsafe { tensor.read(&mut self.copy) };
                &self.copy
            }
        };
        captured.rows.reserve(wanted);
        captured.values.reserve(wanted * width);
        for (row, values) in rows.iter().zip(values.chunks_exact(width)) {
            if self.which.has(row) {
                captured.rows.push(*row);
                captured.values.extend_from_slice(values);
            }
        }
    }
}

/// Rows that take the place of those of the same tokens in one layer's residual, before the program reads and patches it.
#[derive(Debug, Clone)]
pub struct Replacement {
    layer: LayerIndex,
    width: usize,
    /// `[n, width]`
    values: Vec<f32>,
    /// Index of each token's row.
    tokens: BTreeMap<(i32, i32), usize>,
}

impl Replacement {
    /// `rows`, `[n, n_embd]`, in place of the residual at `layer` of each of `tokens`, `[n]`; of a token that is named twice the last counts.
    ///
    /// # Panics
    /// If there are not as many rows as tokens.
    pub fn new(
        layer: LayerIndex,
        tokens: impl IntoIterator<Item = (SequenceId, TokenPosition)>,
        rows: Residual<'_>,
    ) -> Self {
        let tokens: Vec<_> = tokens.into_iter().map(|(sequence, position)| (sequence.0, position.0)).collect();
        assert_eq!(tokens.len(), rows.n_rows(), "rows to put in place of the residual of as many tokens");
        let tokens = tokens.into_iter().enumerate().map(|(index, token)| (token, index)).collect();
        Self { layer, width: rows.width(), values: rows.values().to_vec(), tokens }
    }

    pub(super) fn layer(&self) -> LayerIndex {
        self.layer
    }

    pub(super) fn width(&self) -> usize {
        self.width
    }

    pub(super) fn has(&self, sequence: SequenceId, position: TokenPosition) -> bool {
        self.tokens.contains_key(&(sequence.0, position.0))
    }

    fn row(&self, row: &Row) -> Option<&[f32]> {
        let index = self.tokens.get(&(row.sequence?.0, row.position.0))?;
        Some(&self.values[index * self.width..(index + 1) * self.width])
    }

    /// Puts rows in their place, and returns how many.
    ///
    /// # Safety
    /// As of [`Tensor::bytes`].
    pub(super) unsafe fn run(&self, rows: &[Row], tensor: &mut Tensor<'_>) -> usize {
        // SAFETY: guaranteed by the caller.
        match unsafe { tensor.bytes() } {
            TensorBytes::Host(values) => self.put(rows, values),
            TensorBytes::Device => {
                let mut values = vec![0.0; tensor.n_elements()];
                // SAFETY: as above.
                unsafe { tensor.read(&mut values) };
                let replaced = self.put(rows, &mut values);
                // SAFETY: as above.
                unsafe { tensor.write(&values) };
                replaced
            }
        }
    }

    fn put(&self, rows: &[Row], values: &mut [f32]) -> usize {
        let mut replaced = 0;
        for (row, values) in rows.iter().zip(values.chunks_exact_mut(self.width)) {
            if let Some(row) = self.row(row) {
                values.copy_from_slice(row);
                replaced += 1;
            }
        }
        replaced
    }
}
