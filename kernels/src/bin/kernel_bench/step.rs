//! The launches of a decoded token at Llama-3.2-3B's shape, each alone and all together.

use crate::products::ROTATED_BYTES;
use crate::weights::{Random, random_weight};
use crate::{read, relative_error, time};
use cubecl::client::Client;
use cubecl::server::Handle;
use labpipe_kernels::cube::gemv::Epilogue;
use labpipe_kernels::cube::ops::{Gate, Heads};
use labpipe_kernels::cube::{
    self, ChooseScratch, DecodeScratch, DeviceMatrix, Element, Gemv, LayerCache, Norm, Place, Residual, Tuning,
};

const HEADS: Heads = Heads { n_heads: 24, n_kv_heads: 8, head_dim: 128, qk_norm: false, rotary_dim: 128 };
const HIDDEN: usize = 3072;
const VOCAB: usize = 128_256;
const LAYERS: usize = 28;

/// One product of a layer.
#[derive(Clone, Copy)]
struct Use {
    name: &'static str,
    n: usize,
    k: usize,
    norm: bool,
    epilogue: Epilogue,
}

const USES: [Use; 4] = [
    Use { name: "qkv", n: 5120, k: HIDDEN, norm: true, epilogue: Epilogue::Store },
    Use { name: "o", n: HIDDEN, k: HIDDEN, norm: false, epilogue: Epilogue::Add },
    Use { name: "gate_up", n: 16_384, k: HIDDEN, norm: true, epilogue: Epilogue::SiluMul },
    Use { name: "down", n: HIDDEN, k: 8192, norm: false, epilogue: Epilogue::Add },
];

const HEAD: Use = Use { name: "head", n: VOCAB, k: HIDDEN, norm: true, epilogue: Epilogue::Store };

/// Buffers that all products share.
struct Buffers {
    x: Handle,
    ones: Handle,
    y: Handle,
    normed: Handle,
    wide: Handle,
    want: Handle,
}

impl Buffers {
    fn new(client: &Client, random: &mut Random) -> Buffers {
        let floats = |values: Vec<f32>| client.create_from_slice(bytemuck::cast_slice(&values));
        Buffers {
            x: floats(random.floats(16_384)),
            ones: floats(vec![1.0; 16_384]),
            y: client.empty(4 * VOCAB),
            normed: client.empty(4 * 16_384),
            wide: client.empty(4 * VOCAB),
            want: client.empty(4 * VOCAB),
        }
    }

    fn launch(&self, client: &Client, matrix: &DeviceMatrix, of: Use, y: &Handle, tuning: Tuning) {
        let norm = of.norm.then_some(Norm { weight: &self.ones, eps: 1e-5 });
        let call = Gemv { x: &self.x, y, m: 1, norm, bias: None, epilogue: of.epilogue };
        cube::gemv(client, matrix, &call, tuning);
    }

    /// Returns what the generic kernels make of a use, onto zeros where it adds.
    fn reference(&self, client: &Client, matrix: &DeviceMatrix, of: Use) -> Vec<f32> {
        let step =
            Residual { x: &self.x, delta: None, delta_norm: None, norm: Some((&self.ones, &self.normed)), eps: 1e-5 };
        cube::add_norm(client, Element::F32, &step, 1, of.k);
        let x = if of.norm { &self.normed } else { &self.x };
        cube::linear(client, matrix, [Element::F32; 2], x, None, &self.wide, Place::whole(matrix), 1);
        if of.epilogue == Epilogue::SiluMul {
            cube::gate(client, Element::F32, Gate::Silu, true, &self.wide, &self.want, [1, of.n / 2]);
            return read(client, &self.want)[..of.n / 2].to_vec();
        }
        read(client, &self.wide)[..of.n].to_vec()
    }

    fn error(&self, client: &Client, matrix: &DeviceMatrix, of: Use, tuning: Tuning, want: &[f32]) -> f64 {
        client.write(&self.y, cubecl::bytes::Bytes::from_bytes_vec(vec![0u8; 4 * VOCAB]));
        self.launch(client, matrix, of, &self.y, tuning);
        relative_error(&read(client, &self.y)[..want.len()], want)
    }
}

/// Returns enough copies of a matrix that L2 holds none of them when it is next read.
fn copies(client: &Client, kind: &str, of: Use, at_least: usize, random: &mut Random) -> Vec<DeviceMatrix> {
    let weight = random_weight(kind, of.n, of.k, random);
    let mut copies = vec![DeviceMatrix::upload(client, &weight).expect("a scheme with kernels")];
    while copies.len() < at_least || copies.len() * (copies[0].device_bytes() as usize) < ROTATED_BYTES {
        copies.push(DeviceMatrix::upload(client, &weight).expect("a scheme with kernels"));
    }
    copies
}

fn tunings(kind: &str) -> Vec<Tuning> {
    let (copies, shapes): (u32, &[(u32, u32)]) = match kind {
        "f16" | "int8" => (8, &[(8, 3), (8, 4), (8, 6), (16, 2), (16, 3), (16, 4), (16, 8)]),
        _ => (32, &[(8, 2), (8, 3), (8, 4), (12, 2), (12, 3), (16, 2), (16, 4)]),
    };
    let spread = |&(planes, unroll): &(u32, u32)| {
        [1, 2, 3, 4].map(|cubes_a_processor| Tuning { planes, unroll, copies, cubes_a_processor })
    };
    shapes.iter().flat_map(spread).collect()
}

/// Prints the best settings of each product.
pub fn sweep_rows(client: &Client, copy: f64) {
    let mut random = Random(3);
    let buffers = Buffers::new(client, &mut random);
    let kinds = std::env::args().nth(2).unwrap_or_else(|| "nf4-double,f16,int8".to_owned());
    for kind in kinds.split(',') {
        let head = (kind == "f16").then_some(HEAD);
        for of in USES.into_iter().chain(head) {
            let matrices = copies(client, kind, of, 1, &mut random);
            let bytes = matrices[0].device_bytes() as f64;
            let want = buffers.reference(client, &matrices[0], of);
            let mut rows = Vec::new();
            for tuning in tunings(kind) {
                let error = buffers.error(client, &matrices[0], of, tuning, &want);
                let n_calls = (2 * matrices.len()).max(8);
                let launch = |i: usize| buffers.launch(client, &matrices[i % matrices.len()], of, &buffers.y, tuning);
                if let Some(seconds) = time(client, n_calls, launch) {
                    rows.push((seconds, tuning, error));
                }
            }
            rows.sort_by(|a, b| a.0.total_cmp(&b.0));
            let worst = rows.iter().map(|row| row.2).fold(0.0, f64::max);
            println!("{kind} {} {}x{}: worst error {worst:.1e} of {}", of.name, of.n, of.k, rows.len());
            for (seconds, tuning, _) in rows.iter().take(5).chain(rows.last()) {
                let rate = bytes / seconds / 1e12;
                println!(
                    "  p{} u{} b{}  {:7.2} us {rate:5.2} TB/s {:3.0} %",
                    tuning.planes,
                    tuning.unroll,
                    tuning.cubes_a_processor,
                    seconds * 1e6,
                    100.0 * rate / copy
                );
            }
        }
    }
}

/// A layer's cache and what its attention needs.
struct Attention {
    keys: Handle,
    values: Handle,
    rope: Handle,
    qkv: Handle,
    state: Handle,
    capacity: usize,
}

impl Attention {
    fn new(client: &Client, capacity: usize, random: &mut Random) -> Attention {
        let halves = |n: usize, random: &mut Random| -> Vec<half::f16> {
            random.floats(n).into_iter().map(half::f16::from_f32).collect()
        };
        let n = capacity * (HEADS.n_kv_heads * HEADS.head_dim) as usize;
        Attention {
            keys: client.create_from_slice(bytemuck::cast_slice(&halves(n, random))),
            values: client.create_from_slice(bytemuck::cast_slice(&halves(n, random))),
            rope: client.create_from_slice(bytemuck::cast_slice(&vec![0.7f32; capacity * HEADS.head_dim as usize])),
            qkv: client.create_from_slice(bytemuck::cast_slice(&random.floats(5120))),
            state: client.create_from_slice(&vec![0u8; 4 * (capacity + 16)]),
            capacity,
        }
    }

    fn layer(&self) -> LayerCache<'_> {
        LayerCache {
            element: Element::F16,
            keys: &self.keys,
            values: &self.values,
            capacity: self.capacity,
            rope: &self.rope,
            qk_norm: None,
            eps: 1e-5,
            heads: HEADS,
            window: u32::MAX,
            scale: 0.088,
            soft_cap: None,
        }
    }

    fn at(&self, client: &Client, position: usize) {
        let mut words = vec![0u32; self.capacity + 16];
        words[0] = position as u32;
        let bytes = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        client.write(&self.state, cubecl::bytes::Bytes::from_bytes_vec(bytes));
    }
}

fn attention_rows(client: &Client, buffers: &Buffers, random: &mut Random) {
    for capacity in [1024, 8448] {
        let attention = Attention::new(client, capacity, random);
        let layer = attention.layer();
        let scratch = DecodeScratch::new(client, &layer).expect("heads that the kernel knows");
        for position in [0, 128, 512, 2048, 8192] {
            if position >= capacity {
                continue;
            }
            attention.at(client, position);
            cube::rope_append(client, Element::F32, &layer, &attention.qkv, &buffers.normed, &attention.state, 1);
            cube::attention(client, Element::F32, &layer, &buffers.normed, &buffers.want, &attention.state, 1);
            let want = read(client, &buffers.want)[..HIDDEN].to_vec();
            cube::decode_attention(client, &layer, &scratch, &attention.qkv, &buffers.y, &attention.state);
            let error = relative_error(&read(client, &buffers.y)[..HIDDEN], &want);
            let seconds = time(client, 56, |_| {
                cube::decode_attention(client, &layer, &scratch, &attention.qkv, &buffers.y, &attention.state);
            });
            let us = seconds.map_or(f64::NAN, |s| s * 1e6);
            println!("attention at {position:5} of {capacity:5}  {us:7.2} us  error {error:.1e}");
        }
    }
}

/// Prints each launch of a step, and steps of whole models.
pub fn step_rows(client: &Client, copy: f64) {
    let mut random = Random(4);
    let buffers = Buffers::new(client, &mut random);
    let us = |seconds: Option<f64>| seconds.map_or(f64::NAN, |s| s * 1e6);
    let tiny = time(client, 200, |_| cube::soft_cap(client, &buffers.wide, 32, 30.0));
    println!("a launch of next to nothing  {:7.2} us", us(tiny));
    attention_rows(client, &buffers, &mut random);
    let attention = Attention::new(client, 1024, &mut random);
    let layer = attention.layer();
    let scratch = DecodeScratch::new(client, &layer).expect("heads that the kernel knows");
    let choice = ChooseScratch::new(client, VOCAB);
    let state = (&attention.state, attention.capacity + 16);
    let choose = || cube::choose(client, (&buffers.wide, VOCAB), state, None, &choice);
    attention.at(client, 0);
    println!("choose  {:7.2} us", us(time(client, 20, |_| choose())));
    let head = copies(client, "f16", HEAD, 1, &mut random);
    let embed = time(client, 20, |_| {
        cube::embed(client, &head[0], &attention.state, attention.capacity + 16, [1, 1], 1.0, &buffers.normed);
    });
    println!("embed  {:7.2} us", us(embed));
    for kind in ["nf4-double", "f16", "int8"] {
        let matrices = USES.map(|of| copies(client, kind, of, LAYERS, &mut random));
        for (of, matrices) in USES.iter().zip(&matrices).chain([(&HEAD, &head)]) {
            let tuning = Tuning::of(&matrices[0]);
            let want = buffers.reference(client, &matrices[0], *of);
            let error = buffers.error(client, &matrices[0], *of, tuning, &want);
            let n_calls = (2 * matrices.len()).max(8);
            let seconds = time(client, n_calls, |i| {
                buffers.launch(client, &matrices[i % matrices.len()], *of, &buffers.y, tuning);
            });
            let rate = matrices[0].device_bytes() as f64 / us(seconds) / 1e6;
            println!(
                "{kind:11} {:8} {:6}x{:<5} p{} u{} b{} {:7.2} us {rate:5.2} TB/s {:3.0} %  error {error:.1e}",
                of.name,
                of.n,
                of.k,
                tuning.planes,
                tuning.unroll,
                tuning.cubes_a_processor,
                us(seconds),
                100.0 * rate / copy
            );
        }
        for position in [0, 512] {
            attention.at(client, position);
            let step = time(client, 1, |_| {
                for (i, _) in matrices[0].iter().enumerate().take(LAYERS) {
                    let launch = |u: usize, y: &Handle| {
                        let matrix = &matrices[u][i];
                        buffers.launch(client, matrix, USES[u], y, Tuning::of(matrix));
                    };
                    launch(0, &buffers.wide);
                    cube::decode_attention(client, &layer, &scratch, &buffers.wide, &buffers.normed, &attention.state);
                    launch(1, &buffers.y);
                    launch(2, &buffers.want);
                    launch(3, &buffers.y);
                }
                buffers.launch(client, &head[0], HEAD, &buffers.wide, Tuning::of(&head[0]));
                choose();
            });
            println!("{kind:11} a token from {position}: {:.3} ms, {:.0} tokens/s", us(step) / 1e3, 1e6 / us(step));
        }
    }
}

/// Launches each product once as a step would, for a profiler.
pub fn once(client: &Client) {
    let mut random = Random(5);
    let buffers = Buffers::new(client, &mut random);
    let kind = std::env::args().nth(2).unwrap_or_else(|| "nf4-double".to_owned());
    for of in USES {
        let matrix = DeviceMatrix::upload(client, &random_weight(&kind, of.n, of.k, &mut random));
        let matrix = matrix.expect("a scheme with kernels");
        let want = buffers.reference(client, &matrix, of);
        println!("{kind} {}: error {:.1e}", of.name, buffers.error(client, &matrix, of, Tuning::of(&matrix), &want));
    }
}
