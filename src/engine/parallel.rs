use super::EngineError;
use super::model::{Model, context_params};
use crate::hook::ContextError;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;

/// Writes several continuations of one text at once, unguarded: a decode of many sequences takes little longer than one of a single
/// sequence.
pub struct ParallelSampler<'model> {
    model: &'model Model,
    context: LlamaContext<'model>,
    batch: LlamaBatch<'static>,
    start: Vec<LlamaToken>,
    width: usize,
    max_tokens: usize,
}

/// A continuation that is being written.
struct Slot {
    /// The start is sequence 0, slots follow.
    sequence: i32,
    sampler: LlamaSampler,
    bytes: Vec<u8>,
    next: LlamaToken,
}

impl<'model> ParallelSampler<'model> {
    /// Continues `start` by up to `max_tokens` tokens, `width` times at once.
    ///
    /// # Errors
    /// `start` has no tokens, or llama.cpp can't make the context.
    pub fn new(
        model: &'model Model,
        start: Vec<LlamaToken>,
        width: usize,
        max_tokens: usize,
    ) -> Result<Self, EngineError> {
        if start.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        let n_ctx = start.len() + width * max_tokens;
        // llama.cpp wants room in a batch for one output of every sequence.
        let n_batch = start.len().max(width + 1);
        // One KV stream, so that the start's cells are shared and not copied.
        let params =
            context_params(n_ctx as u32, n_batch as u32).with_n_seq_max(width as u32 + 1).with_kv_unified(true);
        let context = model.weights().plain(params)?;
        Ok(Self { model, context, batch: LlamaBatch::new(n_batch, 1), start, width, max_tokens })
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// One text a slot, at temperature 1. Slot `i` is seeded with `seed + i`.
    ///
    /// # Errors
    /// llama.cpp can't decode.
    pub fn round(&mut self, seed: u32) -> Result<Vec<String>, EngineError> {
        let vocab = self.model.llama().vocab();
        self.context.clear_kv_cache();
        self.batch.clear();
        for (position, token) in self.start.iter().enumerate() {
            let output = position + 1 == self.start.len();
            self.batch.add(*token, position as i32, &[0], output).expect("the batch has room for the start");
        }
        self.context.decode(&mut self.batch).map_err(ContextError::from)?;
        let mut texts = vec![String::new(); self.width];
        let mut slots = Vec::with_capacity(self.width);
        for index in 0..self.width as u32 {
            let sequence = index as i32 + 1;
            self.context.copy_kv_cache_seq(0, sequence, None, None).map_err(ContextError::from)?;
            let seed = seed.wrapping_add(index);
            let mut sampler = LlamaSampler::chain_simple([LlamaSampler::temp(1.0), LlamaSampler::dist(seed)]);
            let next = sampler.sample(&self.context, self.start.len() as i32 - 1);
            slots.push(Slot { sequence, sampler, bytes: Vec::new(), next });
        }
        for written in 0..self.max_tokens {
            slots.retain_mut(|slot| {
                let ended = vocab.is_eog(slot.next);
                if !ended {
                    slot.bytes.extend(vocab.token_to_piece(slot.next, false, None));
                }
                let goes_on = !ended && written + 1 < self.max_tokens;
                if !goes_on {
                    texts[slot.sequence as usize - 1] = String::from_utf8_lossy(&slot.bytes).into_owned();
                }
                goes_on
            });
            if slots.is_empty() {
                break;
            }
            self.batch.clear();
            let position = (self.start.len() + written) as i32;
            for slot in &slots {
                self.batch.add(slot.next, position, &[slot.sequence], true).expect("the batch has room for every slot");
            }
            self.context.decode(&mut self.batch).map_err(ContextError::from)?;
            for (index, slot) in slots.iter_mut().enumerate() {
                slot.next = slot.sampler.sample(&self.context, index as i32);
            }
        }
        Ok(texts)
    }
}
