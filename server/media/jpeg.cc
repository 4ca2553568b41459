#include "server/media/jpeg.h"

#include <cstdint>

#include "kernels/core/error.h"
#include "server/media/ffmpeg.h"

namespace slalom {
namespace {

// FFmpeg's scale: 1 is the best, 31 the worst.
constexpr int kQuality = 4;

ffmpeg::CodecContext OpenMjpeg(int width, int height) {
  const AVCodec* codec = avcodec_find_encoder(AV_CODEC_ID_MJPEG);
  if (codec == nullptr) throw Error(ErrorCode::kInternal, "FFmpeg has no MJPEG encoder");
  ffmpeg::CodecContext context(avcodec_alloc_context3(codec));
  if (!context) throw Error(ErrorCode::kResourceExhausted, "out of memory for a preview");
  context->width = width;
  context->height = height;
  context->pix_fmt = AV_PIX_FMT_YUV420P;
  context->color_range = AVCOL_RANGE_JPEG;
  context->time_base = {1, 1};
  context->thread_count = 1;
  context->flags |= AV_CODEC_FLAG_QSCALE | AV_CODEC_FLAG_BITEXACT;
  context->global_quality = FF_QP2LAMBDA * kQuality;
  ffmpeg::Check(avcodec_open2(context.get(), codec, nullptr), "opening the JPEG encoder");
  return context;
}

}  // namespace

std::string EncodeJpeg(const Tensor& image) {
  const int height = static_cast<int>(image.dim(0));
  const int width = static_cast<int>(image.dim(1));
  ffmpeg::CodecContext codec = OpenMjpeg(width, height);
  ffmpeg::Scaler scaler(sws_getContext(width, height, AV_PIX_FMT_RGB24, width, height,
                                       AV_PIX_FMT_YUV420P, SWS_BICUBIC | SWS_ACCURATE_RND, nullptr,
                                       nullptr, nullptr));
  if (!scaler) throw Error(ErrorCode::kInternal, "swscale cannot turn RGB into yuv420p");
  const int* bt601 = sws_getCoefficients(SWS_CS_ITU601);
  constexpr int kOne = 1 << 16;
  ffmpeg::Check(sws_setColorspaceDetails(scaler.get(), bt601, 1, bt601, 1, 0, kOne, kOne),
                "setting the colour space");

  ffmpeg::Frame frame(av_frame_alloc());
  ffmpeg::Packet packet(av_packet_alloc());
  if (!frame || !packet) throw Error(ErrorCode::kResourceExhausted, "out of memory for a preview");
  frame->format = AV_PIX_FMT_YUV420P;
  frame->color_range = AVCOL_RANGE_JPEG;
  frame->width = width;
  frame->height = height;
  frame->quality = codec->global_quality;
  frame->pts = 0;
  ffmpeg::Check(av_frame_get_buffer(frame.get(), 0), "allocating a preview");
  const auto* source = image.data<std::uint8_t>();
  const int stride = width * 3;
  ffmpeg::Check(sws_scale(scaler.get(), &source, &stride, 0, height, frame->data, frame->linesize),
                "converting a preview");
  ffmpeg::Check(avcodec_send_frame(codec.get(), frame.get()), "encoding a preview");
  ffmpeg::Check(avcodec_receive_packet(codec.get(), packet.get()), "encoding a preview");
  return std::string(reinterpret_cast<const char*>(packet->data),
                     static_cast<std::size_t>(packet->size));
}

}  // namespace slalom
