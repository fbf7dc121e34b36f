use super::TensorError;

/// A read-only view of residual activations, `[n_rows, width]` row-major, one row a token.
#[derive(Clone, Copy, Debug)]
pub struct Residual<'a> {
    values: &'a [f32],
    width: usize,
}

impl<'a> Residual<'a> {
    /// # Errors
    /// [`TensorError::RaggedRows`] if `values` is not a whole number of rows, or `width` is 0.
    pub fn new(values: &'a [f32], width: usize) -> Result<Self, TensorError> {
        check_rows(values.len(), width)?;
        Ok(Self { values, width })
    }

    pub fn n_rows(&self) -> usize {
        self.values.len() / self.width
    }

    pub fn width(&self) -> usize {
        self.width
    }

    pub fn values(&self) -> &'a [f32] {
        self.values
    }

    /// Row `row`, `[width]`.
    ///
    /// # Panics
    /// If `row` is not below [`n_rows`](Self::n_rows).
    pub fn row(&self, row: usize) -> &'a [f32] {
        &self.values[row * self.width..(row + 1) * self.width]
    }

    pub fn rows(&self) -> std::slice::ChunksExact<'a, f32> {
        self.values.chunks_exact(self.width)
    }

    /// The first value that is not finite: its row, its index in the row, and itself.
    pub fn first_non_finite(&self) -> Option<(usize, usize, f32)> {
        let at = self.values.iter().position(|value| !value.is_finite())?;
        Some((at / self.width, at % self.width, self.values[at]))
    }
}

/// A view of residual activations that may be patched, `[n_rows, width]` row-major, one row a token.
#[derive(Debug)]
pub struct ResidualMut<'a> {
    values: &'a mut [f32],
    width: usize,
}

impl<'a> ResidualMut<'a> {
    /// # Errors
    /// [`TensorError::RaggedRows`] if `values` is not a whole number of rows, or `width` is 0.
    pub fn new(values: &'a mut [f32], width: usize) -> Result<Self, TensorError> {
        check_rows(values.len(), width)?;
        Ok(Self { values, width })
    }

    pub fn n_rows(&self) -> usize {
        self.values.len() / self.width
    }

    pub fn width(&self) -> usize {
        self.width
    }

    pub fn as_residual(&self) -> Residual<'_> {
        Residual { values: self.values, width: self.width }
    }

    /// Row `row`, `[width]`.
    ///
    /// # Panics
    /// If `row` is not below [`n_rows`](Self::n_rows).
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.values[row * self.width..(row + 1) * self.width]
    }

    /// `rows`, `[rows.len(), width]`.
    ///
    /// # Panics
    /// If it ends past [`n_rows`](Self::n_rows).
    pub fn rows_mut(&mut self, rows: std::ops::Range<usize>) -> &mut [f32] {
        &mut self.values[rows.start * self.width..rows.end * self.width]
    }
}

fn check_rows(len: usize, width: usize) -> Result<(), TensorError> {
    if width == 0 || !len.is_multiple_of(width) {
        return Err(TensorError::RaggedRows { what: "residual", width, found: len });
    }
    Ok(())
}
