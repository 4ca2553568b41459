#include "server/media/mp4_encoder.h"

#include <algorithm>
#include <cstdint>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "kernels/core/error.h"
#include "server/media/ffmpeg.h"

namespace slalom {
namespace {

constexpr int kIoBufferBytes = 32 * 1024;
// How far x264 looks ahead to share out its bits. Eight frames cost little compression against its
// default of forty and let the first fragment leave while the decoder is still at work.
constexpr int kLookahead = 8;
// B-frames would save a few percent, but a fragmented file has no edit list to hide their
// reordering delay: every frame would be shown one frame late.
constexpr int kBFrames = 0;
constexpr int kGopSeconds = 4;

ffmpeg::CodecContext OpenX264(const VideoFormat& format) {
  const AVCodec* codec = avcodec_find_encoder_by_name("libx264");
  if (codec == nullptr) throw Error(ErrorCode::kInternal, "FFmpeg has no libx264 encoder");
  ffmpeg::CodecContext context(avcodec_alloc_context3(codec));
  if (!context) throw Error(ErrorCode::kResourceExhausted, "out of memory for the H.264 encoder");
  // FFmpeg logs by default what x264 says about itself, for every clip; errors still come through.
  context->log_level_offset = AV_LOG_INFO - AV_LOG_ERROR;
  context->width = format.width;
  context->height = format.height;
  context->pix_fmt = AV_PIX_FMT_YUV420P;
  context->time_base = {1, format.fps};
  context->framerate = {format.fps, 1};
  context->gop_size = format.fps * kGopSeconds;
  context->max_b_frames = kBFrames;
  context->thread_count = format.threads;
  // Slices would hold no frame back, but cost plain clips up to a third more bytes.
  context->thread_type = FF_THREAD_FRAME;
  context->color_range = AVCOL_RANGE_MPEG;
  context->color_primaries = AVCOL_PRI_BT709;
  context->color_trc = AVCOL_TRC_BT709;
  context->colorspace = AVCOL_SPC_BT709;
  context->chroma_sample_location = AVCHROMA_LOC_LEFT;
  // MP4 keeps SPS and PPS in moov; without bitexact x264 writes its version into the stream.
  context->flags |= AV_CODEC_FLAG_GLOBAL_HEADER | AV_CODEC_FLAG_BITEXACT;
  ffmpeg::Dictionary options;
  options.Set("preset", "veryfast");
  options.Set("profile", "high");
  options.Set("crf", std::to_string(CrfOf(format.quality)));
  options.Set("rc-lookahead", std::to_string(kLookahead));
  std::string parameters = "log=0:sync-lookahead=0";
  // x264 164 does not always code a clip the same way with its AVX-512 code: of 8,000 codings of
  // one clip of noise 18 had another block. With AVX2 all were alike, and the same as most with
  // AVX-512.
  if (av_get_cpu_flags() & AV_CPU_FLAG_AVX512) parameters += ":asm=avx2";
  options.Set("x264-params", parameters);
  ffmpeg::Check(avcodec_open2(context.get(), codec, options.get()), "opening the H.264 encoder");
  return context;
}

ffmpeg::Scaler MakeScaler(const VideoFormat& format) {
  ffmpeg::Scaler scaler(sws_getContext(format.width, format.height, AV_PIX_FMT_RGB24, format.width,
                                       format.height, AV_PIX_FMT_YUV420P,
                                       SWS_BICUBIC | SWS_ACCURATE_RND | SWS_FULL_CHR_H_INT, nullptr,
                                       nullptr, nullptr));
  if (!scaler) throw Error(ErrorCode::kInternal, "swscale cannot turn RGB into yuv420p");
  const int* bt709 = sws_getCoefficients(SWS_CS_ITU709);
  constexpr int kOne = 1 << 16;
  // Full range RGB to limited range BT.709; the default would be BT.601.
  ffmpeg::Check(sws_setColorspaceDetails(scaler.get(), bt709, 1, bt709, 0, 0, kOne, kOne),
                "setting the colour space");
  return scaler;
}

void CheckFormat(const VideoFormat& format) {
  std::vector<FieldViolation> violations;
  const auto check = [&](const char* field, int value, bool good, const char* allowed) {
    if (!good) violations.push_back({field, std::to_string(value) + " is not " + allowed});
  };
  check("width", format.width, format.width >= 2 && format.width % 2 == 0, "even and positive");
  check("height", format.height, format.height >= 2 && format.height % 2 == 0, "even and positive");
  check("fps", format.fps, format.fps >= 1 && format.fps <= 120, "in 1 to 120");
  check("output.quality", format.quality, format.quality >= 1 && format.quality <= 100,
        "in 1 to 100");
  if (!violations.empty()) throw Error(std::move(violations));
}

}  // namespace

double CrfOf(int quality) { return 40.0 - 30.0 * (quality - 1) / 99.0; }

class Mp4Encoder::Impl {
 public:
  Impl(const VideoFormat& format, Output output) : format_(format), output_(std::move(output)) {
    CheckFormat(format);
    codec_ = OpenX264(format);
    scaler_ = MakeScaler(format);
    packet_.reset(av_packet_alloc());
    frame_.reset(av_frame_alloc());
    if (!packet_ || !frame_) throw Error(ErrorCode::kResourceExhausted, "out of memory for frames");
    OpenMuxer();
  }

  void AddFrame(std::span<const std::byte> rgb) {
    const std::size_t expected = static_cast<std::size_t>(format_.width) * format_.height * 3;
    if (rgb.size() != expected) {
      throw Error(ErrorCode::kInternal, "a frame has " + std::to_string(rgb.size()) +
                                            " bytes instead of " + std::to_string(expected));
    }
    // x264 keeps references to frames that it looks back at, so each frame gets its own buffers.
    av_frame_unref(frame_.get());
    frame_->format = AV_PIX_FMT_YUV420P;
    frame_->width = format_.width;
    frame_->height = format_.height;
    frame_->color_range = AVCOL_RANGE_MPEG;
    frame_->colorspace = AVCOL_SPC_BT709;
    ffmpeg::Check(av_frame_get_buffer(frame_.get(), 0), "allocating a frame");
    // swscale's vector code reads up to 16 bytes beyond the last pixel.
    padded_.resize(expected + AV_INPUT_BUFFER_PADDING_SIZE);
    std::ranges::copy(rgb, padded_.begin());
    const auto* source = reinterpret_cast<const std::uint8_t*>(padded_.data());
    const int stride = format_.width * 3;
    ffmpeg::Check(sws_scale(scaler_.get(), &source, &stride, 0, format_.height, frame_->data,
                            frame_->linesize),
                  "converting a frame");
    frame_->pts = next_pts_++;
    Encode(frame_.get());
  }

  void Flush() {
    if (!packets_since_flush_) return;
    packets_since_flush_ = false;
    // A null packet makes the muxer interleave what it holds; av_write_frame with null ends the
    // fragment (movflags frag_custom).
    CheckWrite(av_interleaved_write_frame(muxer_.get(), nullptr), "interleaving");
    CheckWrite(av_write_frame(muxer_.get(), nullptr), "ending a fragment");
    avio_flush(muxer_->pb);
    Rethrow();
  }

  void Finish() {
    Encode(nullptr);
    Flush();
    CheckWrite(av_write_trailer(muxer_.get()), "writing the trailer");
    avio_flush(muxer_->pb);
    Rethrow();
  }

 private:
  void OpenMuxer() {
    AVFormatContext* raw = nullptr;
    ffmpeg::Check(avformat_alloc_output_context2(&raw, nullptr, "mp4", nullptr),
                  "allocating the MP4 muxer");
    muxer_.reset(raw);
    auto* buffer = static_cast<unsigned char*>(av_malloc(kIoBufferBytes));
    if (buffer == nullptr) throw Error(ErrorCode::kResourceExhausted, "out of memory");
    io_.reset(avio_alloc_context(buffer, kIoBufferBytes, 1, this, nullptr, &Impl::Write, nullptr));
    if (!io_) {
      av_free(buffer);
      throw Error(ErrorCode::kResourceExhausted, "out of memory");
    }
    io_->seekable = 0;
    muxer_->pb = io_.get();
    muxer_->flags |= AVFMT_FLAG_CUSTOM_IO | AVFMT_FLAG_BITEXACT;
    AVStream* stream = avformat_new_stream(muxer_.get(), nullptr);
    if (stream == nullptr) throw Error(ErrorCode::kResourceExhausted, "out of memory");
    ffmpeg::Check(avcodec_parameters_from_context(stream->codecpar, codec_.get()),
                  "describing the stream");
    stream->time_base = codec_->time_base;
    stream->avg_frame_rate = codec_->framerate;
    ffmpeg::Dictionary options;
    options.Set("movflags", "empty_moov+default_base_moof+frag_custom");
    CheckWrite(avformat_write_header(muxer_.get(), options.get()), "writing the MP4 header");
    avio_flush(muxer_->pb);
    Rethrow();
  }

  // `frame` null: drains the encoder.
  void Encode(const AVFrame* frame) {
    ffmpeg::Check(avcodec_send_frame(codec_.get(), frame), "encoding a frame");
    while (true) {
      const int result = avcodec_receive_packet(codec_.get(), packet_.get());
      if (result == AVERROR(EAGAIN) || result == AVERROR_EOF) return;
      ffmpeg::Check(result, "encoding a frame");
      packet_->duration = 1;
      packet_->stream_index = 0;
      av_packet_rescale_ts(packet_.get(), codec_->time_base, muxer_->streams[0]->time_base);
      CheckWrite(av_interleaved_write_frame(muxer_.get(), packet_.get()), "muxing a frame");
      packets_since_flush_ = true;
    }
  }

  // FFmpeg calls this from C: an exception waits in error_ until the call has come back.
  static int Write(void* opaque, std::uint8_t* data, int size) {
    auto* self = static_cast<Impl*>(opaque);
    if (self->error_) return AVERROR(EIO);
    try {
      self->output_(std::as_bytes(std::span(data, static_cast<std::size_t>(size))));
    } catch (...) {
      self->error_ = std::current_exception();
      return AVERROR(EIO);
    }
    return size;
  }

  void Rethrow() {
    if (error_) std::rethrow_exception(error_);
  }

  void CheckWrite(int result, const char* what) {
    Rethrow();
    ffmpeg::Check(result, what);
  }

  const VideoFormat format_;
  const Output output_;
  std::exception_ptr error_;
  ffmpeg::CodecContext codec_;
  ffmpeg::Scaler scaler_;
  ffmpeg::Packet packet_;
  ffmpeg::Frame frame_;
  ffmpeg::Io io_;
  ffmpeg::Muxer muxer_;            // writes through io_
  std::vector<std::byte> padded_;  // the frame that is being converted
  std::int64_t next_pts_ = 0;
  bool packets_since_flush_ = false;
};

Mp4Encoder::Mp4Encoder(const VideoFormat& format, Output output)
    : impl_(std::make_unique<Impl>(format, std::move(output))) {}
Mp4Encoder::~Mp4Encoder() = default;
void Mp4Encoder::AddFrame(std::span<const std::byte> rgb) { impl_->AddFrame(rgb); }
void Mp4Encoder::Flush() { impl_->Flush(); }
void Mp4Encoder::Finish() { impl_->Finish(); }

}  // namespace slalom
