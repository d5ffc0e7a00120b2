//! Compiles `proto/exproto.proto` with protox, so that no `protoc` is needed. The interface
//! itself is kept beside the code, for reflection.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/exproto.proto");
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).open_file("exproto.proto")?;
    let files = compiler.file_descriptor_set();
    let folder = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    let encoded = compiler.encode_file_descriptor_set();
    std::fs::write(folder.join("exproto.bin"), encoded)?;
    tonic_prost_build::configure()
        .build_transport(false)
        // Payloads are slices of the HTTP/2 frames they came in, never copies.
        .bytes(".")
        .codec_path("crate::proto::codec::Codec")
        // Holds a password: its Debug is written by hand in `src/proto.rs`.
        .skip_debug(["emqx.exproto.v1.AuthenticateRequest"])
        .compile_fds(files)?;
    Ok(())
}
