//! Compiles `proto/exproto.proto` with protox, so that no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/exproto.proto");
    let files = protox::compile(["exproto.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .build_transport(false)
        // Payloads are slices of the HTTP/2 frames they came in, never copies.
        .bytes(".")
        // Holds a password: its Debug is written by hand in `src/proto.rs`.
        .skip_debug(["emqx.exproto.v1.AuthenticateRequest"])
        .compile_fds(files)?;
    Ok(())
}
