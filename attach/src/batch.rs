//! llama.cpp's extended batches (`llama_batch_ext`), which its functions alone fill in and none reads out: what these were told, kept for each.

use crate::guards::lock;
use crate::llama::Batch;
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::null;
use std::sync::Mutex;

/// What llama.cpp answers where it has added a row and refused its token.
const REFUSED_TOKEN: i32 = -2;

/// Batches that live, by their addresses.
static WRITTEN: Mutex<Option<HashMap<usize, Written>>> = Mutex::new(None);

/// What a batch holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    rows: Vec<Row>,
    /// Whether it is all there is: a row that was added where none was expected has others before it that nobody has seen.
    is_whole: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    /// None where it is given as an embedding.
    token: Option<i32>,
    sequences: Vec<i32>,
    position: i32,
    output: bool,
}

/// The same as llama.cpp's older batches have it, whose arrays are these.
pub struct Arrays {
    tokens: Option<Vec<i32>>,
    positions: Vec<i32>,
    n_sequences: Vec<i32>,
    sequences: Vec<*const i32>,
    outputs: Vec<i8>,
    _written: Written,
}

/// Takes note of a batch that has been made, with nothing in it, or emptied.
pub fn empty(batch: *const c_void) {
    let written = Written { rows: Vec::new(), is_whole: true };
    lock(&WRITTEN).get_or_insert_default().insert(batch as usize, written);
}

pub fn forget(batch: *const c_void) {
    lock(&WRITTEN).get_or_insert_default().remove(&(batch as usize));
}

/// Notes what was told of `batch`, if its making was seen.
pub fn note(batch: *const c_void, what: impl FnOnce(&mut Written)) {
    if let Some(written) = lock(&WRITTEN).get_or_insert_default().get_mut(&(batch as usize)) {
        what(written);
    }
}

/// What `batch` holds, if all of that was seen.
pub fn read(batch: *const c_void) -> Option<Arrays> {
    let written = lock(&WRITTEN).get_or_insert_default().get(&(batch as usize)).cloned();
    Some(Arrays::new(written.filter(|written| written.is_whole)?))
}

impl Written {
    /// A row of `sequence` has been added; `index` is what llama.cpp calls it, or below 0 where it could not be.
    pub fn add(&mut self, index: i32, sequence: i32, token: Option<i32>) {
        if index == REFUSED_TOKEN {
            self.is_whole = false;
        }
        let Ok(index) = usize::try_from(index) else { return };
        self.is_whole &= index == self.rows.len();
        self.rows.push(Row { token, sequences: vec![sequence], position: 0, output: false });
    }

    pub fn add_sequence(&mut self, index: i32, sequence: i32) {
        self.change(index, |row| row.sequences.push(sequence));
    }

    pub fn set_position(&mut self, index: i32, position: i32) {
        self.change(index, |row| row.position = position);
    }

    pub fn set_output(&mut self, index: i32, output: bool) {
        self.change(index, |row| row.output = output);
    }

    fn change(&mut self, index: i32, change: impl FnOnce(&mut Row)) {
        match usize::try_from(index).ok().and_then(|index| self.rows.get_mut(index)) {
            Some(row) => change(row),
            None => self.is_whole = false,
        }
    }
}

impl Arrays {
    fn new(written: Written) -> Self {
        let rows = &written.rows;
        Self {
            tokens: rows.iter().map(|row| row.token).collect(),
            positions: rows.iter().map(|row| row.position).collect(),
            n_sequences: rows.iter().map(|row| row.sequences.len() as i32).collect(),
            sequences: rows.iter().map(|row| row.sequences.as_ptr()).collect(),
            outputs: rows.iter().map(|row| i8::from(row.output)).collect(),
            _written: written,
        }
    }

    /// Valid as long as this is.
    pub fn batch(&self) -> Batch {
        Batch {
            n_tokens: self.positions.len() as i32,
            token: self.tokens.as_ref().map_or(null(), |tokens| tokens.as_ptr()),
            embd: null(),
            pos: self.positions.as_ptr(),
            n_seq_id: self.n_sequences.as_ptr(),
            seq_id: self.sequences.as_ptr(),
            logits: self.outputs.as_ptr(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_of_a_batch_is_what_it_holds() {
        let address = [0u8; 1];
        let batch = address.as_ptr().cast();
        assert!(read(batch).is_none(), "its making was not seen");
        empty(batch);
        note(batch, |written| {
            written.add(0, 3, Some(7));
            written.set_position(0, 4);
            // It was full.
            written.add(-1, 3, Some(7));
            written.add(1, 5, Some(8));
            written.add_sequence(1, 6);
            written.set_position(1, 9);
            written.set_output(1, true);
        });
        let arrays = read(batch).unwrap();
        assert_eq!((arrays.tokens.as_deref(), &arrays.positions[..]), (Some(&[7, 8][..]), &[4, 9][..]));
        assert_eq!((&arrays.n_sequences[..], &arrays.outputs[..]), (&[1, 2][..], &[0, 1][..]));
        assert_eq!(arrays._written.rows[1].sequences, [5, 6]);
        // Embeddings are no tokens.
        note(batch, |written| written.add(2, 3, None));
        assert!(read(batch).unwrap().batch().token.is_null());
        // There is a row between that nobody has seen.
        note(batch, |written| written.add(4, 3, Some(7)));
        assert!(read(batch).is_none());
        empty(batch);
        assert_eq!(read(batch).unwrap().batch().n_tokens, 0);
        forget(batch);
        assert!(read(batch).is_none());
    }
}
