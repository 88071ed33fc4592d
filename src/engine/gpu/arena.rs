//! The memory of a pass: one allocation, and what lies where in it.

use cubecl::client::Client;
use cubecl::server::Handle;
use labpipe_kernels::cube;
use std::ops::Range;

/// Buffers begin at multiples of this many bytes, which every runtime can bind.
const ALIGNMENT: usize = 512;

/// How the MLP runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mlp {
    /// All of gate and up, then all of down.
    Whole,
    /// So many rows of gate, and as many of up, at a time, then that part of down: each adds to the columns of their product that are
    /// kept at a time.
    Panels { gate_rows: usize, product_cols: usize },
}

/// What a pass needs memory for.
#[derive(Debug, Clone, Copy)]
pub struct Needs {
    /// Tokens.
    pub n: usize,
    /// Bytes of an activation.
    pub size: usize,
    pub hidden: usize,
    pub q: usize,
    pub kv: usize,
    pub ffn: usize,
    /// Sublayers write their output to a buffer; otherwise they add it to the residual stream themselves.
    pub has_deltas: bool,
    pub mlp: Mlp,
    /// Bytes of rows that are decoded at a time.
    pub panel_bytes: usize,
    /// Bytes of logits at a time, after the last block.
    pub logit_bytes: usize,
}

/// Where the buffers of a pass lie, in bytes. Those that are never needed together share their place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    pub normed: Range<usize>,  // [n, hidden]; rotated queries too, once the norm's rows are used
    pub x: Range<usize>,       // [n, hidden] f32, the residual stream
    pub delta: Range<usize>, // [n, hidden], sublayer output; empty where the sublayer adds it to the residual stream itself
    pub qkv: Range<usize>,   // [n, q + 2 kv]; attention output too, once keys and values are in the cache
    pub wide: Range<usize>,  // [n, 2 ffn] or [n, 2 gate_rows]: gate and up before the activation
    pub product: Range<usize>, // [n, ffn] or [n, product_cols]
    pub panel: Range<usize>, // decoded rows
    pub logits: Range<usize>, // after the last block: everything but `normed` and `panel`
    pub n_bytes: usize,
}

impl Layout {
    pub fn new(needs: &Needs) -> Layout {
        let &Needs { n, size, hidden, q, kv, ffn, .. } = needs;
        let (wide_width, product_width) = match needs.mlp {
            Mlp::Whole => (2 * ffn, ffn),
            Mlp::Panels { gate_rows, product_cols } => (2 * gate_rows, product_cols),
        };
        let normed = behind(0, n * hidden.max(q) * size);
        let x = behind(normed.end, 4 * n * hidden);
        // Attention's buffers and the MLP's share a place. A sublayer's output outlives its other buffers: it comes first.
        let delta = behind(x.end, if needs.has_deltas { n * hidden * size } else { 0 });
        let qkv = behind(delta.end, n * (q + 2 * kv) * size);
        let wide = behind(x.end, n * wide_width * size);
        let product = behind(wide.end.max(delta.end), n * product_width * size);
        let end = qkv.end.max(product.end);
        let logits = x.start..behind(x.start, needs.logit_bytes).end.max(end);
        let panel = behind(logits.end, needs.panel_bytes);
        Layout { n_bytes: panel.end.next_multiple_of(ALIGNMENT), normed, x, delta, qkv, wide, product, panel, logits }
    }
}

fn behind(end: usize, n_bytes: usize) -> Range<usize> {
    let start = end.next_multiple_of(ALIGNMENT);
    start..start + n_bytes
}

/// The allocation, kept from pass to pass.
#[derive(Default)]
pub struct Arena {
    held: Option<Handle>,
}

impl Arena {
    /// Returns true where a pass of so many bytes needs no new allocation.
    pub fn holds(&self, n_bytes: usize) -> bool {
        self.held.as_ref().is_some_and(|held| held.size() as usize >= n_bytes)
    }

    /// Gives the memory back.
    pub fn release(&mut self) {
        self.held = None;
    }

    /// Returns the memory, at least so many bytes of it.
    pub fn get(&mut self, client: &Client, n_bytes: usize) -> Handle {
        if !self.holds(n_bytes) {
            // The old one goes first.
            self.held = None;
        }
        self.held.get_or_insert_with(|| cube::kept(client, n_bytes)).clone()
    }
}

/// Returns a part of an allocation.
pub fn part(held: &Handle, bytes: &Range<usize>) -> Handle {
    let behind = held.size() - bytes.end as u64;
    held.clone().offset_start(bytes.start as u64).offset_end(behind)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama-3.2-3B's shape, 2,048 tokens, NF4 with double quantization.
    const LLAMA: Needs = Needs {
        n: 2048,
        size: 2,
        hidden: 3072,
        q: 3072,
        kv: 1024,
        ffn: 8192,
        has_deltas: false,
        mlp: Mlp::Panels { gate_rows: 1024, product_cols: 2048 },
        panel_bytes: 12 << 20,
        logit_bytes: 96 * 4 * 128_256,
    };

    fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
        a.start < b.end && b.start < a.end
    }

    #[test]
    fn buffers_that_are_needed_together_do_not_overlap() {
        let whole = Needs { has_deltas: true, mlp: Mlp::Whole, panel_bytes: 24 << 20, logit_bytes: 4, ..LLAMA };
        let product = Mlp::Panels { gate_rows: 100, product_cols: 8192 };
        let narrow = Needs { n: 3, hidden: 72, q: 64, kv: 8, ffn: 173, size: 4, panel_bytes: 0, ..whole };
        for needs in [LLAMA, whole, Needs { mlp: product, ..whole }, narrow, Needs { mlp: Mlp::Whole, ..LLAMA }] {
            let at = Layout::new(&needs);
            let together: [&[&Range<usize>]; 4] = [
                &[&at.normed, &at.x, &at.delta, &at.qkv, &at.panel],
                &[&at.normed, &at.x, &at.wide, &at.product, &at.panel],
                &[&at.normed, &at.x, &at.product, &at.delta, &at.panel],
                &[&at.normed, &at.logits, &at.panel],
            ];
            for buffers in together {
                for (i, a) in buffers.iter().enumerate() {
                    assert!(a.start % ALIGNMENT == 0 && a.end <= at.n_bytes, "{a:?} of {at:?}");
                    assert!(buffers[i + 1..].iter().all(|b| !overlap(a, b)), "{a:?} in {at:?}");
                }
            }
            assert!(at.logits.len() >= needs.logit_bytes);
        }
    }

    #[test]
    fn a_prefill_of_2048_tokens_at_3b_stays_in_its_budget() {
        // What docs/performance.md lists: cubecl's page for small buffers, the rotary table, cuBLAS's workspace.
        let others = (8 << 20) + (1 << 20) + (8 << 20);
        let beside_weights_and_cache = 2_576_980_377 - 2_242_719_744 - 234_881_024;
        let prefill = Layout::new(&Needs { logit_bytes: 4 * 128_256, ..LLAMA }).n_bytes;
        let scoring = Layout::new(&LLAMA).n_bytes;
        assert_eq!((prefill, scoring), (71_303_168, 74_416_128));
        assert!(scoring + others < beside_weights_and_cache);
    }
}
