//! Kernels that only CUDA runs are lowered to CUDA C++ here, without a GPU: what can't be lowered fails before anyone rents one.
#![cfg(all(feature = "wgpu", feature = "cuda"))]

use cubecl::cuda::CudaRuntime;
use cubecl::prelude::*;
use cubecl::{Compiler, CubeKernel};
use cubecl_cpp::shared::{CompilationOptions, CppCompiler, CppSupportedFeatures};
use cubecl_cpp::target::Cuda;
use cubecl_server::runtime::Runtime;
use labpipe_kernels::cube::Element;
use labpipe_kernels::cube::decode_attention::{Split, decode_attention_kernel};
use labpipe_kernels::cube::flash::flash_attention_kernel;
use labpipe_kernels::cube::gemv::{
    Affine4Pairs, Bf16Pairs, Codebook4Pairs, Epilogue, F16Pairs, Fragments, GemvSpec, Int8Pairs, gemv_kernel,
};
use labpipe_kernels::cube::ops::{Heads, choose_kernel, stamp_kernel};
use labpipe_kernels::cube::quantize::{
    Book, Reading, absmax_kernel, codebook_codes_kernel, convert_kernel, int4_codes_kernel, int4_stats_kernel,
    int8_codes_kernel, nested_codes_kernel,
};
use std::sync::Arc;

fn source(kernel: &dyn CubeKernel) -> String {
    let options = CompilationOptions {
        warp_size: 32,
        supports_features: CppSupportedFeatures { grid_constants: true, ..CppSupportedFeatures::default() },
        amd_wmma: None,
    };
    let started = std::time::Instant::now();
    let definition = kernel.define();
    let defined = started.elapsed();
    let text = CppCompiler::<Cuda>::default().compile(definition, &options).expect("a kernel that lowers").to_string();
    eprintln!("defined in {defined:?}, lowered in {:?}", started.elapsed() - defined);
    text
}

fn gemv_source<S: Fragments>(width: usize, spec: GemvSpec) -> String {
    // Only properties and handles are taken from it.
    let client = cubecl::Device::default().client();
    let handle = client.empty(1 << 20);
    let buffer = || unsafe { BufferArg::from_raw_parts(handle.clone(), 1024) };
    let kernel = gemv_kernel::create_dummy_kernel::<S>(
        client.properties_shared(),
        Arc::new(CudaRuntime::target_properties()),
        CubeCount::Static(1, 1, 1),
        CubeDim::new_1d(spec.planes * 32),
        width,
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        1,
        1e-5,
        0,
        0,
        spec,
    );
    source(&kernel)
}

/// Keeps a source where a folder for it is named, for a look or for NVRTC.
fn keep(name: &str, text: &str) {
    if let Some(dir) = std::env::var_os("LABPIPE_CUDA_SOURCES") {
        std::fs::write(std::path::Path::new(&dir).join(format!("{name}.cu")), text).expect("a writable folder");
    }
}

#[test]
fn matrix_vector_kernels_use_tensor_cores() {
    let spec = GemvSpec {
        n_rows: 3072,
        n_cols: 3072,
        m: 1,
        block_size: 64,
        nested: true,
        norm: true,
        has_bias: false,
        epilogue: Epilogue::Store,
        planes: 8,
        unroll: 3,
        copies: 32,
        slots: 1,
        overlaps: true,
    };
    let plain = GemvSpec { nested: false, copies: 8, ..spec };
    let sources = [
        ("gemv-nf4", gemv_source::<Codebook4Pairs>(2, spec)),
        ("gemv-nf4-m8", gemv_source::<Codebook4Pairs>(2, GemvSpec { m: 8, epilogue: Epilogue::SiluMul, ..spec })),
        (
            "gemv-nf4-down",
            gemv_source::<Codebook4Pairs>(
                4,
                GemvSpec { n_cols: 8192, planes: 16, unroll: 4, norm: false, slots: 2, ..spec },
            ),
        ),
        ("gemv-nf4-16", gemv_source::<Codebook4Pairs>(4, GemvSpec { planes: 8, slots: 2, unroll: 3, ..spec })),
        (
            "gemv-nf4-gate",
            gemv_source::<Codebook4Pairs>(4, GemvSpec { n_rows: 16384, slots: 2, epilogue: Epilogue::SiluMul, ..spec }),
        ),
        ("gemv-f16-16", gemv_source::<F16Pairs>(4, GemvSpec { planes: 16, ..plain })),
        (
            "gemv-f16-down",
            gemv_source::<F16Pairs>(4, GemvSpec { n_cols: 8192, planes: 16, unroll: 4, norm: false, ..plain }),
        ),
        ("gemv-int8", gemv_source::<Int8Pairs>(4, plain)),
        ("gemv-f16", gemv_source::<F16Pairs>(4, plain)),
        ("gemv-bf16", gemv_source::<Bf16Pairs>(4, plain)),
        ("gemv-int4", gemv_source::<Affine4Pairs>(2, GemvSpec { block_size: 128, ..plain })),
    ];
    for (name, text) in &sources {
        keep(name, text);
        assert!(text.contains("mma.sync.aligned.m16n8k16"), "{name}");
    }
}

fn heads(head_dim: u32) -> Heads {
    Heads { n_heads: 24, n_kv_heads: 8, head_dim, qk_norm: false, rotary_dim: head_dim }
}

#[test]
fn attention_kernels_are_lowered() {
    let client = cubecl::Device::default().client();
    let handle = client.empty(1 << 20);
    let buffer = || unsafe { BufferArg::from_raw_parts(handle.clone(), 1024) };
    let properties = client.properties_shared();
    let target = Arc::new(CudaRuntime::target_properties());
    for head_dim in [64, 128] {
        let kernel = flash_attention_kernel::create_dummy_kernel::<half::f16>(
            properties.clone(),
            target.clone(),
            CubeCount::Static(1, 1, 1),
            CubeDim::new_1d(128),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            1,
            1,
            1,
            1.0,
            heads(head_dim),
            false,
        );
        let text = source(&kernel);
        keep(&format!("flash-{head_dim}"), &text);
        assert!(text.contains("ldmatrix") && text.contains("mma.sync"));
        let split = Split {
            heads: heads(head_dim),
            group: 3,
            units: 256,
            chunk: 256,
            n_splits: 10,
            combines: true,
            overlaps: true,
        };
        let kernel = decode_attention_kernel::create_dummy_kernel::<half::f16>(
            properties.clone(),
            target.clone(),
            CubeCount::Static(1, 1, 1),
            CubeDim::new_1d(256),
            8,
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            1,
            1,
            1.0,
            split,
        );
        let text = source(&kernel);
        keep(&format!("decode-attention-{head_dim}"), &text);
        assert!(text.contains("__threadfence"));
    }
}

/// Exactness rests on IEEE division and on comparisons with NaN: nothing here may be compiled to approximate instructions.
#[test]
fn quantizing_kernels_are_lowered() {
    let client = cubecl::Device::default().client();
    let handle = client.empty(1 << 20);
    let buffer = || unsafe { BufferArg::from_raw_parts(handle.clone(), 1024) };
    let properties = client.properties_shared();
    let target = Arc::new(CudaRuntime::target_properties());
    let (count, dim) = (CubeCount::Static(1, 1, 1), CubeDim::new_1d(256));
    let reading = Reading { source: Element::Bf16, base: Element::F16 };
    macro_rules! lowered {
        ($name:literal, $kernel:ident, $($argument:expr),+) => {{
            let (properties, target) = (properties.clone(), target.clone());
            let kernel = $kernel::create_dummy_kernel(properties, target, count.clone(), dim, $($argument),+);
            let text = source(&kernel);
            keep($name, &text);
            assert!(!text.contains("__fdividef") && !text.contains("fast_"), "{}", $name);
        }};
    }
    lowered!("quantize-absmax", absmax_kernel, buffer(), buffer(), 1, 64, 0, 0.0, 8, reading);
    lowered!(
        "quantize-nf4",
        codebook_codes_kernel,
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        1,
        64,
        0,
        0,
        Book::Nf4,
        reading
    );
    lowered!(
        "quantize-fp4",
        codebook_codes_kernel,
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        1,
        64,
        0,
        0,
        Book::Fp4,
        reading
    );
    lowered!("quantize-nested", nested_codes_kernel, buffer(), buffer(), buffer(), buffer(), 1, 0, 0, 0.0);
    lowered!("quantize-int8", int8_codes_kernel, buffer(), buffer(), buffer(), 1, 64, 0, 0, reading);
    lowered!("quantize-int4-stats", int4_stats_kernel, buffer(), buffer(), 1, 64, 32, 0, false, reading);
    lowered!("quantize-int4", int4_codes_kernel, buffer(), buffer(), buffer(), 1, 64, 32, 0, 0, reading);
    lowered!("quantize-convert", convert_kernel, buffer(), buffer(), 1, 0, reading);
}

#[test]
fn steps_read_the_device_s_clock() {
    let client = cubecl::Device::default().client();
    let handle = client.empty(1 << 20);
    let buffer = || unsafe { BufferArg::from_raw_parts(handle.clone(), 1024) };
    let target = Arc::new(CudaRuntime::target_properties());
    let count = CubeCount::Static(1, 1, 1);
    let (properties, dim) = (client.properties_shared(), CubeDim::new_1d(32));
    let stamp = stamp_kernel::create_dummy_kernel(properties.clone(), target.clone(), count.clone(), dim, buffer());
    let choose = choose_kernel::create_dummy_kernel(
        properties,
        target,
        count,
        CubeDim::new_1d(256),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        1024,
        64,
        256,
        true,
        true,
    );
    for (name, text) in [("stamp", source(&stamp)), ("choose", source(&choose))] {
        keep(name, &text);
        assert!(text.contains("%globaltimer"), "{name}");
    }
}
