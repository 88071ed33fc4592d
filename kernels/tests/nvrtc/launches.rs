//! The kernels that are compiled, each by what launches it: the library's own functions, called as the engine does for three models.

use cubecl::client::Client;
use cubecl::server::Handle;
use labpipe_kernels::cube::decode::Format;
use labpipe_kernels::cube::gemv::Epilogue;
use labpipe_kernels::cube::ops::{Gate, Heads};
use labpipe_kernels::cube::quantize::{Book, Reading};
use labpipe_kernels::cube::{
    self, ChooseScratch, DecodeScratch, DeviceMatrix, Element, FileMatrix, Form, Gemv, Kind, LayerCache, LossMeter,
    MatrixLoader, Norm, Piece, Place, Residual, Tuning,
};
use labpipe_kernels::weight::SharedBytes;
use std::convert::Infallible;

/// How many variants of each kernel are launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Those of Llama-3.2-3B in fp16 and in each scheme.
    Main,
    /// The tensor-core kernels of the other two models too.
    Models,
    /// All element types, families, models and schemes too.
    All,
}

impl Extent {
    /// Returns the first `n` of a list whose order is that of importance; all of it for `All`.
    fn of<T>(self, n: usize, all: &[T]) -> &[T] {
        if self == Extent::All { all } else { &all[..n] }
    }

    fn models(self) -> &'static [Model] {
        if self == Extent::Main { &MODELS[..1] } else { &MODELS }
    }
}

/// Launches that use the kernels named, and no others.
pub struct Launches {
    pub kernels: &'static [&'static str],
    pub launch: fn(&Client, Extent),
    /// What is in each kernel's CUDA C++, and what is not.
    pub contains: &'static [&'static str],
    pub lacks: &'static [&'static str],
    /// From compute capability 9.0 on they begin before the launch in front of them has ended.
    pub overlaps: bool,
}

const fn launches(kernels: &'static [&'static str], launch: fn(&Client, Extent)) -> Launches {
    Launches { kernels, launch, contains: &[], lacks: &[], overlaps: false }
}

impl Launches {
    const fn containing(self, contains: &'static [&'static str]) -> Launches {
        Launches { contains, ..self }
    }

    const fn overlapping(self) -> Launches {
        Launches { overlaps: true, ..self }
    }

    const fn lacking(self, lacks: &'static [&'static str]) -> Launches {
        Launches { lacks, ..self }
    }
}

/// Approximate division: what is quantized on the device equals the host's codes because division is IEEE's.
const APPROXIMATE: &[&str] = &["__fdividef", "fast_"];

/// Every kernel of `kernels/src/cube` that CUDA launches.
pub const LAUNCHES: [Launches; 19] = [
    launches(&["embed_kernel"], embed),
    launches(&["add_norm_kernel"], add_norm),
    launches(&["gate_kernel"], gate),
    launches(&["rope_append_kernel"], rope_append),
    launches(&["soft_cap_kernel"], soft_cap),
    launches(&["add_bias_kernel"], add_bias),
    launches(&["linear_kernel"], linear),
    launches(&["dequantize_kernel", "dequantize_vectors_kernel"], dequantize),
    launches(&["mark_outliers_kernel", "quantize_rows_kernel", "outlier_product_kernel"], outliers),
    launches(&["rms_norm_kernel", "rotate_kernel", "argmax_kernel"], rows),
    launches(&["attention_kernel"], attention),
    launches(&["flash_attention_kernel"], flash_attention).containing(&["ldmatrix", "mma.sync"]),
    launches(&["decode_attention_kernel"], decode_attention).containing(&["__threadfence"]).overlapping(),
    launches(&["gemv_kernel"], gemv).containing(&["mma.sync.aligned.m16n8k16"]).overlapping(),
    launches(&["stamp_kernel"], stamp).containing(&["%globaltimer"]),
    launches(&["choose_kernel"], choose).containing(&["%globaltimer"]).overlapping(),
    launches(&["nll_kernel"], score),
    launches(
        &[
            "absmax_kernel",
            "codebook_codes_kernel",
            "nested_codes_kernel",
            "int8_codes_kernel",
            "int4_stats_kernel",
            "int4_codes_kernel",
            "convert_kernel",
        ],
        load,
    )
    .lacking(APPROXIMATE),
    launches(&["loss_kernel", "dequantize_vectors_kernel"], measure_loss).lacking(APPROXIMATE),
];

/// Returns how many bytes each thread of a kernel may spill to its stack, which it has for nothing else: what NVRTC 13.0 spilled when
/// this was written, rounded up to a stack's 8 bytes.
pub fn spill_budget(kernel: &str) -> usize {
    match kernel {
        "attention_kernel" | "flash_attention_kernel" => 8,
        "decode_attention_kernel" => 32,
        _ => 0,
    }
}

/// Kernels that CUDA does not launch, with why.
pub const NOT_ON_CUDA: [(&str, &str); 1] =
    [("combine_kernel", "the last CTA of decode_attention_kernel combines where memory has device scope")];

/// Shapes of a model.
struct Model {
    hidden: usize,
    ffn: usize,
    heads: Heads,
    vocab: usize,
    qkv_bias: bool,
}

const fn model(hidden: usize, ffn: usize, n_heads: u32, n_kv_heads: u32, vocab: usize, qkv_bias: bool) -> Model {
    let heads = Heads { n_heads, n_kv_heads, head_dim: 128, qk_norm: false, rotary_dim: 128 };
    Model { hidden, ffn, heads, vocab, qkv_bias }
}

/// `config.json` of Llama-3.2-3B, Qwen2.5-3B and Llama-3.1-8B.
const MODELS: [Model; 3] = [
    model(3072, 8192, 24, 8, 128_256, false),
    model(2048, 11_008, 16, 2, 151_936, true),
    model(4096, 14_336, 32, 8, 128_256, false),
];

const ELEMENTS: [Element; 3] = [Element::F16, Element::F32, Element::Bf16];

/// Stored forms: every decoder, blocks with and without a second level.
const STORED: [(Kind, u32, bool); 7] = [
    (Kind::F16, 1 << 30, false),
    (Kind::Codebook4, 64, true),
    (Kind::Affine4, 128, false),
    (Kind::Int8, 1 << 30, false),
    (Kind::Bf16, 1 << 30, false),
    (Kind::Codebook4, 64, false),
    (Kind::F32, 1 << 30, false),
];

/// How many of them are fp16 and the schemes of the main extent.
const N_MAIN_STORED: usize = 4;

/// Returns a matrix of a stored form; its buffers hold nothing.
fn matrix(
    client: &Client,
    (kind, block_size, nested): (Kind, u32, bool),
    n_rows: usize,
    n_cols: usize,
) -> DeviceMatrix {
    let buffer = client.empty(4);
    DeviceMatrix {
        kind,
        format: Format { block_size, nested },
        n_rows,
        n_cols,
        codes: buffer.clone(),
        scales: buffer.clone(),
        aux: buffer.clone(),
        tables: buffer,
        segments: [u32::MAX; 2],
        lens: [n_rows * n_cols / 4, 1, 1, 1],
    }
}

/// Returns matrices of one size, for kernels that do not depend on it.
fn small(client: &Client, extent: Extent) -> Vec<DeviceMatrix> {
    extent.of(N_MAIN_STORED, &STORED).iter().map(|stored| matrix(client, *stored, 3072, 3072)).collect()
}

fn embed(client: &Client, extent: Extent) {
    let [tokens, x] = [client.empty(4), client.empty(4)];
    for table in small(client, extent) {
        cube::embed(client, &table, &tokens, 1, [0, 1], 1.0, &x);
    }
}

fn add_norm(client: &Client, extent: Extent) {
    let buffer = client.empty(4);
    let (some, norm) = (Some(&buffer), Some((&buffer, &buffer)));
    let steps = [(some, None, norm), (None, None, norm), (some, None, None), (some, some, norm), (some, some, None)];
    for element in extent.of(2, &ELEMENTS) {
        for &(delta, delta_norm, norm) in extent.of(1, &steps) {
            let step = Residual { x: &buffer, delta, delta_norm, norm, eps: 1e-5 };
            cube::add_norm(client, *element, &step, 1, 3072);
        }
    }
}

fn gate(client: &Client, extent: Extent) {
    let buffer = client.empty(4);
    for element in extent.of(1, &ELEMENTS) {
        for gate in extent.of(1, &[Gate::Silu, Gate::Gelu, Gate::GeluTanh]) {
            for multiply in extent.of(1, &[true, false]) {
                cube::gate(client, *element, *gate, *multiply, &buffer, &buffer, [1, 8192]);
            }
        }
    }
}

/// Returns a layer's cache for `capacity` tokens.
fn layer(buffer: &Handle, element: Element, heads: Heads, capacity: usize, soft_cap: Option<f32>) -> LayerCache<'_> {
    LayerCache {
        element,
        keys: buffer,
        values: buffer,
        capacity,
        rope: buffer,
        qk_norm: heads.qk_norm.then_some((buffer, buffer)),
        eps: 1e-6,
        heads,
        window: u32::MAX,
        scale: 0.088,
        soft_cap,
    }
}

/// Heads of Llama-3.2-3B and of other families: narrow ones, Qwen3's with norms, Phi-3's of 96, Gemma's of 256.
const HEADS: [Heads; 5] = [
    MODELS[0].heads,
    Heads { n_heads: 32, n_kv_heads: 8, head_dim: 64, qk_norm: false, rotary_dim: 64 },
    Heads { n_heads: 32, n_kv_heads: 8, head_dim: 128, qk_norm: true, rotary_dim: 128 },
    Heads { n_heads: 32, n_kv_heads: 32, head_dim: 96, qk_norm: false, rotary_dim: 96 },
    Heads { n_heads: 8, n_kv_heads: 4, head_dim: 256, qk_norm: true, rotary_dim: 256 },
];

/// Elements of activations and of the cache that passes and steps have together.
const ACTIVATIONS_AND_CACHE: [(Element, Element); 5] = [
    (Element::F16, Element::F16),
    (Element::F32, Element::F16),
    (Element::F32, Element::F32),
    (Element::F32, Element::Bf16),
    (Element::Bf16, Element::Bf16),
];

fn rope_append(client: &Client, extent: Extent) {
    let buffer = client.empty(4);
    for heads in extent.of(1, &HEADS) {
        for (activations, cached) in extent.of(2, &ACTIVATIONS_AND_CACHE) {
            let layer = layer(&buffer, *cached, *heads, 4096, None);
            cube::rope_append(client, *activations, &layer, &buffer, &buffer, &buffer, 1);
        }
    }
}

fn soft_cap(client: &Client, _: Extent) {
    cube::soft_cap(client, &client.empty(4), 256_000, 30.0);
}

fn add_bias(client: &Client, extent: Extent) {
    let buffer = client.empty(4);
    for element in extent.of(1, &ELEMENTS) {
        cube::add_bias(client, *element, &buffer, &buffer, 1, 2560);
    }
}

fn linear(client: &Client, extent: Extent) {
    let buffer = client.empty(4);
    for matrix in small(client, extent) {
        let place = Place::whole(&matrix);
        let types = [Element::F16, Element::F32].map(|y| (Element::F16, y));
        let others = [(Element::F32, Element::F32), (Element::Bf16, Element::Bf16), (Element::Bf16, Element::F32)];
        for &(x, y) in extent.of(1, &[types.as_slice(), &others].concat()) {
            cube::linear(client, &matrix, [x, y], &buffer, None, &buffer, place, 8);
            if y == Element::F32 {
                cube::linear_add(client, &matrix, [x, y], [&buffer, &buffer], place, 8);
            }
            if (extent, x) == (Extent::All, Element::F32) {
                cube::linear(client, &matrix, [x, y], &buffer, Some(&buffer), &buffer, place, 8);
            }
        }
    }
}

fn dequantize(client: &Client, extent: Extent) {
    let buffer = client.empty(4);
    for matrix in small(client, extent) {
        for element in extent.of(1, &ELEMENTS) {
            cube::dequantize(client, &matrix, *element, 0, 64, &buffer);
            // Columns that are no whole vectors.
            let piece = Piece { rows: [0..8, 16..24], cols: 0..100 };
            cube::dequantize_piece(client, &matrix, *element, &piece, &buffer);
        }
    }
}

fn rows(client: &Client, extent: Extent) {
    let buffer = client.empty(4);
    for element in extent.of(2, &ELEMENTS) {
        cube::rms_norm(client, *element, [&buffer; 3], [1, 3072], 1e-5);
        cube::rotate(client, *element, [&buffer; 4], [1, 3072], [128, 128]);
    }
    cube::argmax(client, [&buffer; 2], [1, 128_256]);
}

fn outliers(client: &Client, extent: Extent) {
    let buffer = client.empty(4);
    let int8 = matrix(client, (Kind::Int8, 1 << 30, false), 3072, 3072);
    for element in extent.of(2, &ELEMENTS) {
        cube::outlier_linear(client, &int8, *element, 6.0, &buffer, &buffer, 9);
    }
}

fn attention(client: &Client, extent: Extent) {
    let buffer = client.empty(4);
    for heads in extent.of(1, &HEADS) {
        for (activations, cached) in extent.of(2, &ACTIVATIONS_AND_CACHE) {
            // Gemma 2 caps scores.
            let soft_cap = (heads.head_dim == 256).then_some(50.0);
            let layer = layer(&buffer, *cached, *heads, 4096, soft_cap);
            cube::attention(client, *activations, &layer, &buffer, &buffer, &buffer, 1);
        }
    }
}

fn flash_attention(client: &Client, extent: Extent) {
    let buffer = client.empty(4);
    for heads in extent.of(1, &[MODELS[0].heads, HEADS[1]]) {
        for element in extent.of(1, &[Element::F16, Element::Bf16]) {
            let layer = layer(&buffer, *element, *heads, 4096, None);
            assert!(cube::flash_fits(client, *element, &layer));
            cube::flash_attention(client, *element, &layer, &buffer, &buffer, &buffer, 512);
        }
    }
}

/// Tokens of caches: a benchmark's, one whose CTAs take a head each, the longest that the models have.
const CAPACITIES: [usize; 3] = [4096, 640, 131_072];

fn decode_attention(client: &Client, extent: Extent) {
    let [usual, short, longest] = CAPACITIES;
    let f16 = extent.models().iter().flat_map(|model| [usual, short].map(|n| (Element::F16, model.heads, n)));
    let heads = MODELS.iter().map(|model| model.heads).chain(HEADS);
    let all = heads.flat_map(|heads| {
        ELEMENTS.into_iter().flat_map(move |element| [usual, longest].map(|capacity| (element, heads, capacity)))
    });
    let n_all = if extent == Extent::All { usize::MAX } else { 0 };
    let buffer = client.empty(4);
    for (element, heads, capacity) in f16.chain(all.take(n_all)) {
        let layer = layer(&buffer, element, heads, capacity, None);
        if let Some(scratch) = DecodeScratch::new(client, &layer) {
            cube::decode_attention(client, &layer, &scratch, &buffer, &buffer, &buffer);
        }
    }
}

fn gemv(client: &Client, extent: Extent) {
    for (stored_idx, stored) in extent.of(N_MAIN_STORED, &STORED).iter().enumerate() {
        for model in extent.models() {
            let Model { hidden, ffn, heads, .. } = *model;
            let qkv = ((heads.n_heads + 2 * heads.n_kv_heads) * heads.head_dim) as usize;
            let q = (heads.n_heads * heads.head_dim) as usize;
            multiply(client, &matrix(client, *stored, qkv, hidden), 1, true, model.qkv_bias, Epilogue::Store);
            multiply(client, &matrix(client, *stored, hidden, q), 1, false, false, Epilogue::Add);
            multiply(client, &matrix(client, *stored, 2 * ffn, hidden), 1, true, false, Epilogue::SiluMul);
            multiply(client, &matrix(client, *stored, hidden, ffn), 1, false, false, Epilogue::Add);
            // Heads are seldom quantized.
            if stored_idx == 0 || (extent, stored.0) == (Extent::All, Kind::Bf16) {
                multiply(client, &matrix(client, *stored, model.vocab, hidden), 1, true, false, Epilogue::Store);
            }
        }
        if extent == Extent::All {
            // Gemma's activation, and as many rows of x as there may be.
            multiply(client, &matrix(client, *stored, 18_432, 2304), 1, true, false, Epilogue::GeluMul);
            multiply(client, &matrix(client, *stored, 3072, 3072), 8, true, true, Epilogue::Store);
        }
    }
}

fn multiply(client: &Client, matrix: &DeviceMatrix, m: usize, norm: bool, has_bias: bool, epilogue: Epilogue) {
    let buffer = client.empty(4);
    let paired = matches!(epilogue, Epilogue::SiluMul | Epilogue::GeluMul);
    let fits = cube::gemv_fits(client, matrix, m, paired);
    assert_eq!(
        fits,
        matrix.kind != Kind::F32,
        "{m} rows of x by {:?} {}x{}",
        matrix.kind,
        matrix.n_rows,
        matrix.n_cols
    );
    if fits {
        let norm = norm.then_some(Norm { weight: &buffer, eps: 1e-5 });
        let call = Gemv { x: &buffer, y: &buffer, m, norm, bias: has_bias.then_some(&buffer), epilogue };
        cube::gemv(client, matrix, &call, Tuning::of(matrix));
    }
}

fn stamp(client: &Client, _: Extent) {
    cube::stamp(client, &client.empty(4), 64);
}

fn choose(client: &Client, extent: Extent) {
    let buffer = client.empty(4);
    for model in extent.of(1, &MODELS) {
        let scratch = ChooseScratch::new(client, model.vocab);
        cube::choose(client, (&buffer, model.vocab), (&buffer, 64), Some(&buffer), &scratch);
    }
}

fn score(client: &Client, _: Extent) {
    let buffer = client.empty(4);
    cube::score(client, &buffer, &buffer, &buffer, &buffer, 8, [0, 8], 128_256);
}

/// Types of files, and what their values are rounded to.
const READINGS: [Reading; 6] = [
    reading(Element::Bf16, Element::F16),
    reading(Element::F32, Element::F16),
    reading(Element::F16, Element::F16),
    reading(Element::F16, Element::F32),
    reading(Element::F32, Element::F32),
    reading(Element::F16, Element::Bf16),
];

const fn reading(source: Element, base: Element) -> Reading {
    Reading { source, base }
}

/// Returns a matrix of zeros as a file holds it.
fn file(reading: Reading, n_rows: usize, n_cols: usize) -> FileMatrix {
    let bytes = SharedBytes::from_values(vec![0u8; n_rows * n_cols * reading.source.size_bytes()]);
    FileMatrix { n_rows, bytes, reading }
}

fn load(client: &Client, extent: Extent) {
    let codebook = |book, nested| Form::Codebook { book, block_size: 64, nested };
    let forms = [
        codebook(Book::Nf4, true),
        Form::Int8,
        Form::Int4 { group: 128, symmetric: false },
        codebook(Book::Fp4, false),
        Form::Int4 { group: 128, symmetric: true },
    ];
    let mut loader = MatrixLoader::new(client);
    for reading in extent.of(1, &READINGS) {
        for form in extent.of(3, &forms).iter().copied().chain([Form::Plain(reading.base)]) {
            // Statistics of a row are shared out over more lanes the longer it is.
            for n_cols in extent.of(1, &[3072, 512]) {
                let files = [file(*reading, 8, *n_cols)];
                let loaded = loader.load(form, *n_cols, &files, |_, _, _| Ok::<(), Infallible>(()));
                assert!(loaded.is_ok());
            }
        }
    }
    loader.settle().expect("launches that are collected");
}

fn measure_loss(client: &Client, extent: Extent) {
    let matrix = matrix(client, (Kind::Codebook4, 64, false), 8, 3072);
    let mut meter = LossMeter::new(client);
    for reading in extent.of(1, &READINGS) {
        let measured = meter.measure(&matrix, &file(*reading, 8, 3072), |_, _| Ok::<(), Infallible>(()));
        assert!(measured.is_ok());
    }
}
