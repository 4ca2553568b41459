#include "tests/unit/server/video_reader.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "server/media/ffmpeg.h"

namespace slalom {
namespace {

struct Source {
  const std::string* bytes;
  std::size_t at = 0;
};

int Read(void* opaque, std::uint8_t* out, int size) {
  auto* source = static_cast<Source*>(opaque);
  const std::size_t n =
      std::min(static_cast<std::size_t>(size), source->bytes->size() - source->at);
  if (n == 0) return AVERROR_EOF;
  std::memcpy(out, source->bytes->data() + source->at, n);
  source->at += n;
  return static_cast<int>(n);
}

void Require(int result, const char* what) {
  if (result < 0) throw std::runtime_error(std::string("decoding a video: ") + what);
}

// The demuxer over memory that cannot be seeked, as a player that receives a stream has it.
class Input {
 public:
  explicit Input(const std::string& bytes) : source_{&bytes} {
    constexpr int kBuffer = 4096;
    context_ = avformat_alloc_context();
    context_->pb = avio_alloc_context(static_cast<unsigned char*>(av_malloc(kBuffer)), kBuffer, 0,
                                      &source_, &Read, nullptr, nullptr);
    context_->pb->seekable = 0;
    io_ = context_->pb;
    opened_ = avformat_open_input(&context_, nullptr, nullptr, nullptr) >= 0;
  }
  ~Input() {
    avformat_close_input(&context_);
    av_freep(&io_->buffer);
    avio_context_free(&io_);
  }
  Input(const Input&) = delete;
  Input& operator=(const Input&) = delete;

  bool opened() const { return opened_; }
  AVFormatContext* get() const { return context_; }

 private:
  Source source_;
  AVIOContext* io_ = nullptr;
  AVFormatContext* context_ = nullptr;
  bool opened_ = false;
};

std::vector<std::uint8_t> ToRgb(const AVFrame& frame) {
  ffmpeg::Scaler scaler(sws_getContext(
      frame.width, frame.height, static_cast<AVPixelFormat>(frame.format), frame.width,
      frame.height, AV_PIX_FMT_RGB24, SWS_BICUBIC | SWS_ACCURATE_RND | SWS_FULL_CHR_H_INT, nullptr,
      nullptr, nullptr));
  const int* matrix =
      sws_getCoefficients(frame.colorspace == AVCOL_SPC_BT709 ? SWS_CS_ITU709 : SWS_CS_ITU601);
  const int full_range = frame.color_range == AVCOL_RANGE_JPEG ? 1 : 0;
  sws_setColorspaceDetails(scaler.get(), matrix, full_range, matrix, 1, 0, 1 << 16, 1 << 16);
  std::vector<std::uint8_t> rgb(static_cast<std::size_t>(frame.width) * frame.height * 3);
  std::uint8_t* out = rgb.data();
  const int stride = frame.width * 3;
  sws_scale(scaler.get(), frame.data, frame.linesize, 0, frame.height, &out, &stride);
  return rgb;
}

}  // namespace

DecodedVideo DecodeVideo(const std::string& bytes) {
  const Input input(bytes);
  if (!input.opened()) throw std::runtime_error("decoding a video: no container");
  Require(avformat_find_stream_info(input.get(), nullptr), "no stream info");
  const int index = av_find_best_stream(input.get(), AVMEDIA_TYPE_VIDEO, -1, -1, nullptr, 0);
  Require(index, "no video stream");
  const AVStream* stream = input.get()->streams[index];
  const AVCodec* codec = avcodec_find_decoder(stream->codecpar->codec_id);
  ffmpeg::CodecContext decoder(avcodec_alloc_context3(codec));
  Require(avcodec_parameters_to_context(decoder.get(), stream->codecpar), "parameters");
  Require(avcodec_open2(decoder.get(), codec, nullptr), "no decoder");

  DecodedVideo video;
  video.width = decoder->width;
  video.height = decoder->height;
  video.fps = av_q2d(stream->avg_frame_rate);
  video.codec = codec->name;
  video.bt709 = stream->codecpar->color_space == AVCOL_SPC_BT709 &&
                stream->codecpar->color_range == AVCOL_RANGE_MPEG;
  ffmpeg::Packet packet(av_packet_alloc());
  ffmpeg::Frame frame(av_frame_alloc());
  const auto drain = [&] {
    while (avcodec_receive_frame(decoder.get(), frame.get()) >= 0) {
      video.frames.push_back(ToRgb(*frame));
      video.times.push_back(static_cast<double>(frame->best_effort_timestamp) *
                            av_q2d(stream->time_base));
    }
  };
  while (av_read_frame(input.get(), packet.get()) >= 0) {
    if (packet->stream_index == index && avcodec_send_packet(decoder.get(), packet.get()) >= 0) {
      drain();
    }
    av_packet_unref(packet.get());
  }
  avcodec_send_packet(decoder.get(), nullptr);
  drain();
  return video;
}

double Psnr(const std::vector<std::uint8_t>& a, const std::vector<std::uint8_t>& b) {
  if (a.size() != b.size() || a.empty()) throw std::runtime_error("frames of different sizes");
  double squares = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = static_cast<double>(a[i]) - b[i];
    squares += difference * difference;
  }
  if (squares == 0) return std::numeric_limits<double>::infinity();
  return 10 * std::log10(255.0 * 255.0 * static_cast<double>(a.size()) / squares);
}

}  // namespace slalom
