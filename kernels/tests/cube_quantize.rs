//! Quantization on the device against the host's schemes: the same bytes, on ragged and tiny shapes, from every element type.
//!
//! On CUDA all of them are equal. A runtime whose division is not IEEE's may choose the neighbouring code where a value lies within
//! four ulp of a threshold, and may flush subnormal numbers.
#![cfg(any(feature = "wgpu", feature = "cuda"))]

use cubecl::client::Client;
use cubecl::server::Handle;
use labpipe_kernels::cube::quantize::{Book, Reading};
use labpipe_kernels::cube::{
    self, DeviceMatrix, Element, FileMatrix, Form, LOSS_BUDGET, LossMeter, MatrixLoader, measuring_bytes,
};
use labpipe_kernels::dense::DenseType;
use labpipe_kernels::weight::{DenseWeight, HostWeight, SharedBytes};
use labpipe_kernels::{Packed, SchemeSpec, reconstruction_error, scheme};
use std::io;
use std::sync::Arc;

const SHAPES: [(usize, usize); 8] = [(1, 1), (1, 64), (3, 5), (7, 63), (48, 64), (65, 172), (130, 320), (512, 256)];
const ELEMENTS: [Element; 3] = [Element::F32, Element::F16, Element::Bf16];

fn client() -> Client {
    cubecl::Device::default().client()
}

/// What of a runtime's numbers is not the host's.
fn is_exact(client: &Client) -> bool {
    client.name() == "cuda"
}

/// Values like a layer's, with zeros of both signs, a run of zeros, outliers, and, where `tiny`, numbers that are subnormal in fp16.
fn values(n: usize, seed: u64, tiny: bool) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n)
        .map(|i| {
            let value = 0.1 * (next() + next() + next());
            match i % 97 {
                _ if (256..512).contains(&i) => 0.0,
                3 => 0.0,
                5 => -0.0,
                7 => value * 40.0,
                11..15 if tiny => value * 1e-5,
                _ => value,
            }
        })
        .collect()
}

/// Stores values as a file does; returns their bytes and what they are there.
fn stored(values: &[f32], element: Element) -> (Vec<u8>, Vec<f32>) {
    match element {
        Element::F32 => (bytemuck::cast_slice(values).to_vec(), values.to_vec()),
        Element::F16 => {
            let halves: Vec<half::f16> = values.iter().map(|v| half::f16::from_f32(*v)).collect();
            (bytemuck::cast_slice(&halves).to_vec(), halves.iter().map(|v| v.to_f32()).collect())
        }
        Element::Bf16 => {
            let halves: Vec<half::bf16> = values.iter().map(|v| half::bf16::from_f32(*v)).collect();
            (bytemuck::cast_slice(&halves).to_vec(), halves.iter().map(|v| v.to_f32()).collect())
        }
    }
}

/// A matrix as the file has it and, rounded to its base type, as the host quantizes it.
fn part(n: usize, k: usize, seed: u64, reading: Reading) -> (FileMatrix, Vec<f32>) {
    let (bytes, exact) = stored(&values(n * k, seed, true), reading.source);
    let based = stored(&exact, reading.base).1;
    (FileMatrix { n_rows: n, bytes: misaligned(bytes), reading }, based)
}

/// Tensors of a file need not be aligned for their type.
fn misaligned(mut bytes: Vec<u8>) -> SharedBytes {
    let n = bytes.len();
    bytes.insert(0, 0xff);
    SharedBytes::from_values(bytes).slice(1..n + 1)
}

fn load(client: &Client, form: Form, k: usize, parts: &[FileMatrix]) -> DeviceMatrix {
    let mut loader = MatrixLoader::new(client);
    let matrix = loader.load(form, k, parts, |_, _, bytes| bytes.map(drop));
    loader.settle().expect("a device that works");
    matrix.expect("bytes that can be read")
}

fn words(client: &Client, handle: &Handle, n: usize) -> Vec<u32> {
    let bytes = client.read_one(handle.clone()).expect("readable results");
    bytemuck::pod_collect_to_vec::<u8, u32>(&bytes)[..n].to_vec()
}

fn spec(name: &str, block_size: Option<usize>, double_quant: bool, symmetric: bool) -> SchemeSpec {
    let spec = SchemeSpec { block_size, double_quant, symmetric, ..SchemeSpec::new(name) };
    scheme(name).expect("a known scheme").normalize(&spec).expect("settings that fit")
}

fn specs() -> Vec<SchemeSpec> {
    vec![
        spec("nf4", None, false, false),
        spec("nf4", Some(256), false, false),
        spec("nf4", Some(4096), false, false),
        spec("nf4", None, true, false),
        spec("fp4", None, false, false),
        spec("fp4", Some(128), true, false),
        spec("int8", None, false, false),
        spec("int4", None, false, false),
        spec("int4", Some(8), false, false),
        spec("int4", Some(32), false, true),
    ]
}

fn pack(spec: &SchemeSpec, values: &[f32], n: usize, k: usize) -> Packed {
    scheme(&spec.scheme).expect("a known scheme").pack(spec, values, n, k).expect("finite values")
}

/// Compares buffers word by word with those of the host's matrix.
fn assert_equal(client: &Client, got: &DeviceMatrix, want: &HostWeight, what: &str) {
    let uploaded = DeviceMatrix::upload(client, want).expect("a scheme with kernels");
    assert_eq!(
        (got.kind, got.format, got.n_rows, got.n_cols),
        (uploaded.kind, uploaded.format, uploaded.n_rows, uploaded.n_cols)
    );
    assert_eq!(got.lens, uploaded.lens, "{what}: lengths");
    let pairs = [
        ("scales", &got.scales, &uploaded.scales, got.lens[1]),
        ("aux", &got.aux, &uploaded.aux, got.lens[2]),
        ("tables", &got.tables, &uploaded.tables, got.lens[3]),
    ];
    for (name, got, want, n) in pairs {
        assert_eq!(words(client, got, n), words(client, want, n), "{what}: {name}");
    }
    let codes = [&got.codes, &uploaded.codes].map(|handle| words(client, handle, got.lens[0]));
    if is_exact(client) {
        assert_eq!(codes[0], codes[1], "{what}: codes");
        return;
    }
    let differing = codes[0].iter().zip(&codes[1]).filter(|(got, want)| got != want).count();
    if differing > 0 {
        // Decoded values tell a neighbouring code from a wrong one.
        assert_neighbours(client, got, &uploaded, want, what);
    }
    assert!(differing <= 1 + codes[0].len() / 1000, "{what}: {differing} of {} words differ", codes[0].len());
}

/// Both codes of a value that lies on a threshold are equally far from it.
fn assert_neighbours(client: &Client, got: &DeviceMatrix, uploaded: &DeviceMatrix, want: &HostWeight, what: &str) {
    let (n, k) = (want.n_rows(), want.n_cols());
    let decoded = [got, uploaded].map(|matrix| {
        let out = client.empty(4 * n * k);
        cube::dequantize(client, matrix, Element::F32, 0, n, &out);
        let bytes = client.read_one(out).expect("readable results");
        bytemuck::pod_collect_to_vec::<u8, f32>(&bytes)[..n * k].to_vec()
    });
    let HostWeight::Packed(packed) = want else { panic!("{what}: plain values differ") };
    let widest = packed.scales.iter().fold(0.0f32, |max, scale| max.max(*scale));
    for (at, (got, want)) in decoded[0].iter().zip(&decoded[1]).enumerate() {
        assert!((got - want).abs() <= widest * 0.35, "{what} value {at}: {got} for {want}");
    }
}

#[test]
fn codes_and_statistics_are_the_hosts() {
    let client = client();
    for (n, k) in SHAPES {
        for source in ELEMENTS {
            let reading = Reading { source, base: source };
            let (part, values) = part(n, k, 7, reading);
            for spec in specs() {
                let form = Form::of(Some(&spec), source).expect("a known scheme").expect("a form with kernels");
                let got = load(&client, form, k, std::slice::from_ref(&part));
                let want = HostWeight::Packed(pack(&spec, &values, n, k));
                assert_equal(&client, &got, &want, &format!("{spec:?} of {source:?} {n}x{k}"));
            }
        }
    }
}

#[test]
fn values_are_rounded_to_the_base_type_before_they_are_quantized() {
    let client = client();
    let (n, k) = (33, 128);
    for source in ELEMENTS {
        for base in ELEMENTS {
            let (part, values) = part(n, k, 3, Reading { source, base });
            let spec = spec("nf4", None, true, false);
            let form = Form::of(Some(&spec), base).expect("a known scheme").expect("a form with kernels");
            let got = load(&client, form, k, std::slice::from_ref(&part));
            let want = HostWeight::Packed(pack(&spec, &values, n, k));
            assert_equal(&client, &got, &want, &format!("nf4 of {source:?} as {base:?}"));
        }
    }
}

#[test]
fn plain_values_are_converted_as_the_host_converts_them() {
    let client = client();
    for (n, k) in SHAPES {
        for source in ELEMENTS {
            for base in ELEMENTS {
                let (part, exact) = part(n, k, 5, Reading { source, base });
                let got = load(&client, Form::Plain(base), k, std::slice::from_ref(&part));
                let dtype = match base {
                    Element::F32 => DenseType::F32,
                    Element::F16 => DenseType::F16,
                    Element::Bf16 => DenseType::Bf16,
                };
                let bytes = SharedBytes::from_values(stored(&exact, base).0);
                let want = HostWeight::Dense(DenseWeight { dtype, n_rows: n, n_cols: k, bytes });
                let uploaded = DeviceMatrix::upload(&client, &want).expect("plain values");
                assert_eq!(got.lens, uploaded.lens);
                let codes = [&got.codes, &uploaded.codes].map(|handle| words(&client, handle, got.lens[0]));
                assert_eq!(codes[0], codes[1], "{source:?} as {base:?} {n}x{k}");
            }
        }
    }
}

/// Halfway cases, the smallest and largest numbers, and those that round over a power of two.
#[test]
fn conversions_agree_at_the_edges_of_every_type() {
    let client = client();
    let mut edges: Vec<f32> = Vec::new();
    for bits in (0..0x7c00u16).step_by(37).chain([0, 1, 2, 0x3ff, 0x400, 0x401, 0x7bff]) {
        let (low, high) = (half::f16::from_bits(bits).to_f32(), half::f16::from_bits((bits + 1).min(0x7bff)).to_f32());
        let middle = (low + high) / 2.0;
        edges.extend([low, middle, middle.next_up(), middle.next_down(), -middle, -low]);
    }
    edges.resize(edges.len().next_multiple_of(8), 0.0);
    let k = edges.len();
    for base in [Element::F16, Element::Bf16] {
        let reading = Reading { source: Element::F32, base };
        let part = FileMatrix { n_rows: 1, bytes: SharedBytes::from_values(edges.clone()), reading };
        let got = load(&client, Form::Plain(base), k, &[part]);
        let got: Vec<u16> = bytemuck::cast_slice(&words(&client, &got.codes, k / 2)).to_vec();
        for (value, (got, want)) in edges.iter().zip(got.iter().zip(stored(&edges, base).0.as_chunks::<2>().0)) {
            assert_eq!(*got, u16::from_le_bytes(*want), "{value:e} as {base:?}");
        }
    }
}

/// Three matrices as one: a codebook's blocks end with each one's rows here, and each has second-level scales of its own.
#[test]
fn matrices_are_stored_as_one_as_the_host_stacks_them() {
    let client = client();
    let k = 256;
    for source in [Element::F16, Element::Bf16] {
        let reading = Reading { source, base: source };
        let parts: Vec<_> = [(128, 1), (64, 2), (65, 3)].iter().map(|(n, seed)| part(*n, k, *seed, reading)).collect();
        let files: Vec<FileMatrix> = parts.iter().map(|(file, _)| file.clone()).collect();
        let heights: Vec<usize> = files.iter().map(|file| file.n_rows).collect();
        for spec in specs() {
            let form = Form::of(Some(&spec), source).expect("a known scheme").expect("a form with kernels");
            let host: Vec<_> =
                parts.iter().map(|(file, values)| HostWeight::Packed(pack(&spec, values, file.n_rows, k))).collect();
            let stacked =
                DeviceMatrix::upload_stacked(&client, &host.iter().collect::<Vec<_>>()).expect("known schemes");
            assert_eq!(form.stacks(&heights, k), stacked.is_some(), "{spec:?}");
            let Some(want) = stacked else { continue };
            let got = load(&client, form, k, &files);
            assert_eq!((got.segments, got.n_rows, got.lens), (want.segments, want.n_rows, want.lens), "{spec:?}");
            let pairs = [
                (&got.scales, &want.scales),
                (&got.aux, &want.aux),
                (&got.tables, &want.tables),
                (&got.codes, &want.codes),
            ];
            for ((got, want), n) in pairs.into_iter().zip([want.lens[1], want.lens[2], want.lens[3], want.lens[0]]) {
                let (got, want) = (words(&client, got, n), words(&client, want, n));
                let differing = got.iter().zip(&want).filter(|(got, want)| got != want).count();
                let allowed = if is_exact(&client) { 0 } else { n / 1000 };
                assert!(differing <= allowed, "{spec:?} of {source:?}: {differing} of {n} words differ");
            }
        }
    }
}

/// More than a tile and several pieces, the last of an odd length.
#[test]
fn a_matrix_of_several_tiles_is_whole() {
    let client = client();
    let (n, k) = (4099, 2051);
    let reading = Reading { source: Element::F32, base: Element::F32 };
    let values = values(n * k, 9, false);
    let part = FileMatrix { n_rows: n, bytes: SharedBytes::from_values(values.clone()), reading };
    for spec in [spec("nf4", None, true, false), spec("int8", None, false, false), spec("int4", None, false, false)] {
        let form = Form::of(Some(&spec), Element::F32).expect("a known scheme").expect("a form with kernels");
        let got = load(&client, form, k, std::slice::from_ref(&part));
        assert_equal(&client, &got, &HostWeight::Packed(pack(&spec, &values, n, k)), &format!("{spec:?}"));
    }
    let halves = stored(&values, Element::Bf16).0;
    let reading = Reading { source: Element::Bf16, base: Element::Bf16 };
    let part = FileMatrix { n_rows: n, bytes: SharedBytes::from_values(halves.clone()), reading };
    let got = load(&client, Form::Plain(Element::Bf16), k, &[part]);
    let bytes: Vec<u8> = bytemuck::cast_slice(&words(&client, &got.codes, got.lens[0])).to_vec();
    assert!(bytes[..halves.len()] == halves[..], "copied bytes differ");
}

#[test]
fn the_first_piece_that_is_refused_is_named() {
    let client = client();
    let (n, k) = (1024, 4096);
    let reading = Reading { source: Element::F16, base: Element::F16 };
    let part = FileMatrix { n_rows: n, bytes: SharedBytes::from_values(vec![0u16; n * k]), reading };
    let mut loader = MatrixLoader::new(&client);
    let refuse = |part: usize, at: usize, _: io::Result<&[u8]>| if at >= 4 << 20 { Err((part, at)) } else { Ok(()) };
    let error = loader.load(Form::Plain(Element::F16), k, &[part], refuse).expect_err("a refusal");
    assert_eq!(error, (0, 4 << 20));
}

/// A file that goes with the test.
struct Scratch(std::path::PathBuf);

impl Scratch {
    fn with(name: &str, bytes: &[u8]) -> Scratch {
        let path = std::env::temp_dir().join(format!("labpipe-{name}-{}", std::process::id()));
        std::fs::write(&path, bytes).expect("a writable folder");
        Scratch(path)
    }

    fn open(&self) -> Arc<std::fs::File> {
        Arc::new(std::fs::File::open(&self.0).expect("the file is there"))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Larger than what is copied at a time, and no whole number of words.
#[test]
fn a_file_s_bytes_become_the_matrix_that_they_would_be_in_memory() {
    let client = client();
    let (n, k) = (2_819, 3_073);
    let (bytes, _) = stored(&values(n * k, 77, true), Element::F16);
    let at = 9;
    let file = Scratch::with("matrix", &[vec![0xff; at], bytes.clone(), vec![0xff; 5]].concat());
    // What is mapped is left alone where there is a file.
    let mapped = SharedBytes::mapped(Arc::new(vec![0xaa; at + bytes.len() + 5]), file.open(), 0..usize::MAX);
    let reading = Reading { source: Element::F16, base: Element::F16 };
    for form in [Form::Plain(Element::F16), Form::Codebook { book: Book::Nf4, block_size: 64, nested: true }] {
        let of = |bytes: SharedBytes| load(&client, form, k, &[FileMatrix { n_rows: n, bytes, reading }]);
        let got = of(mapped.slice(at..at + bytes.len()));
        let want = of(SharedBytes::new(Arc::new(bytes.clone()), 0..usize::MAX));
        assert_eq!(got.lens, want.lens);
        assert!(words(&client, &got.codes, got.lens[0]) == words(&client, &want.codes, want.lens[0]), "codes differ");
        assert!(words(&client, &got.aux, got.lens[2]) == words(&client, &want.aux, want.lens[2]), "scales differ");
    }
}

#[test]
fn a_file_that_is_cut_short_meanwhile_is_an_error_at_its_first_piece_that_is_gone() {
    let client = client();
    let (n, k) = (1024, 4096);
    let file = Scratch::with("cut", &vec![0; 2 * n * k]);
    let bytes = SharedBytes::mapped(Arc::new(vec![0u8; 2 * n * k]), file.open(), 0..usize::MAX);
    std::fs::OpenOptions::new().write(true).open(&file.0).and_then(|file| file.set_len(3 << 20)).expect("a cut");
    let part = FileMatrix { n_rows: n, bytes, reading: Reading { source: Element::F16, base: Element::F16 } };
    let mut loader = MatrixLoader::new(&client);
    let look = |_: usize, at: usize, bytes: io::Result<&[u8]>| bytes.map(drop).map_err(|error| (at, error.kind()));
    let error = loader.load(Form::Plain(Element::F16), k, &[part], look).expect_err("a file that ends early");
    assert_eq!(error, (3 << 20, io::ErrorKind::UnexpectedEof));
}

#[test]
fn schemes_without_kernels_are_left_to_the_host() {
    let outliers = SchemeSpec { outlier_threshold: Some(6.0), ..SchemeSpec::new("int8") };
    assert_eq!(Form::of(Some(&outliers), Element::F16), Ok(None));
    assert_eq!(Form::of(Some(&spec("mxfp4", None, false, false)), Element::F16), Ok(None));
    assert!(Form::of(Some(&SchemeSpec::new("nf5")), Element::F16).is_err());
}

/// Mean squared difference and ratio in dB as the device measures them.
fn measured(client: &Client, matrix: &DeviceMatrix, file: &FileMatrix) -> (f64, Option<f64>) {
    let loss = LossMeter::new(client).measure(matrix, file, |_, bytes| bytes.map(|_| ())).expect("bytes in memory");
    loss.read(client).expect("a device that works")
}

/// What a difference of an ulp in decoded values, and of a code where both are as near, adds to the sums' own error. Without them
/// both sums have the same terms.
fn assert_measured(client: &Client, got: (f64, Option<f64>), want: (f64, Option<f64>), what: &str) {
    let apart = want.1.map_or(0.0, |db| (1.0 / f64::from(1u32 << 22)) * 10f64.powf(db / 20.0));
    let budget = LOSS_BUDGET + apart + if is_exact(client) { 0.0 } else { 1e-5 };
    assert!((got.0 - want.0).abs() <= budget * want.0, "{what}: MSE {:e} for {:e}", got.0, want.0);
    assert_eq!(got.1.is_some(), want.1.is_some(), "{what}: {got:?} for {want:?}");
    if let (Some(got), Some(want)) = (got.1, want.1) {
        assert!((got - want).abs() <= 10.0 * budget, "{what}: {got} dB for {want} dB");
    }
}

#[test]
fn what_packing_loses_is_what_the_host_finds() {
    let client = client();
    for (n, k) in SHAPES {
        for source in ELEMENTS {
            let reading = Reading { source, base: source };
            let (part, values) = part(n, k, 7, reading);
            for spec in specs() {
                let what = format!("{spec:?} of {source:?} {n}x{k}");
                let form = Form::of(Some(&spec), source).expect("a known scheme").expect("a form with kernels");
                let packed = pack(&spec, &values, n, k);
                let scheme = scheme(&spec.scheme).expect("a known scheme");
                assert_eq!(form.stored_bytes(n, k), scheme.stored_bytes(&packed), "{what}: bytes");
                let matrix = load(&client, form, k, std::slice::from_ref(&part));
                assert!(measuring_bytes(form, k, &part) >= matrix.device_bytes(), "{what}: room");
                let want = reconstruction_error(&values, &packed);
                assert_measured(&client, measured(&client, &matrix, &part), want, &what);
            }
        }
    }
}

#[test]
fn losses_of_values_that_are_rounded_first_are_those_of_the_rounded() {
    let client = client();
    let (n, k) = (33, 128);
    for source in ELEMENTS {
        for base in ELEMENTS {
            let (part, values) = part(n, k, 3, Reading { source, base });
            let spec = spec("int8", None, false, false);
            let form = Form::of(Some(&spec), base).expect("a known scheme").expect("a form with kernels");
            let matrix = load(&client, form, k, std::slice::from_ref(&part));
            let want = reconstruction_error(&values, &pack(&spec, &values, n, k));
            assert_measured(&client, measured(&client, &matrix, &part), want, &format!("{source:?} as {base:?}"));
        }
    }
}

/// Squares that f32 can't hold, and matrices that lose nothing.
#[test]
fn losses_of_huge_tiny_and_exact_values_are_the_hosts() {
    let client = client();
    let (n, k) = (40, 512);
    let reading = Reading { source: Element::F32, base: Element::F32 };
    let spec = spec("nf4", None, false, false);
    let form = Form::of(Some(&spec), Element::F32).expect("a known scheme").expect("a form with kernels");
    for factor in [1e30f32, 1e-25, 0.0] {
        let values: Vec<f32> = values(n * k, 4, false).iter().map(|value| value * factor).collect();
        let packed = pack(&spec, &values, n, k);
        let want = reconstruction_error(&values, &packed);
        let file = FileMatrix { n_rows: n, bytes: SharedBytes::from_values(values), reading };
        let matrix = load(&client, form, k, std::slice::from_ref(&file));
        assert_measured(&client, measured(&client, &matrix, &file), want, &format!("values times {factor:e}"));
        let mut exact = vec![0.0; n * k];
        scheme("nf4").expect("a known scheme").unpack_rows(&packed, 0, &mut exact);
        let file = FileMatrix { n_rows: n, bytes: SharedBytes::from_values(exact), reading };
        assert_eq!(measured(&client, &matrix, &file), (0.0, None), "what was decoded, times {factor:e}");
    }
}

/// Rows of more than a tile in all, the last tile short; and one row that is longer than a tile.
#[test]
fn losses_of_several_tiles_are_added_up() {
    let client = client();
    for (n, k) in [(4099, 2051), (1, (8 << 20) + 64)] {
        let values = values(n * k, 9, false);
        let spec = spec("nf4", None, true, false);
        let form = Form::of(Some(&spec), Element::F16).expect("a known scheme").expect("a form with kernels");
        let (bytes, values) = stored(&values, Element::F16);
        let reading = Reading { source: Element::F16, base: Element::F16 };
        let file = FileMatrix { n_rows: n, bytes: SharedBytes::from_values(bytes), reading };
        let matrix = load(&client, form, k, std::slice::from_ref(&file));
        let want = reconstruction_error(&values, &pack(&spec, &values, n, k));
        assert_measured(&client, measured(&client, &matrix, &file), want, &format!("{n}x{k}"));
    }
}

#[test]
fn measuring_stops_when_it_is_told_to() {
    let client = client();
    let (part, _) = part(64, 64, 1, Reading { source: Element::F32, base: Element::F32 });
    let form = Form::Int8;
    let matrix = load(&client, form, 64, std::slice::from_ref(&part));
    let stopped = LossMeter::new(&client).measure(&matrix, &part, |_, _| Err("stop"));
    assert_eq!(stopped.err(), Some("stop"));
}
